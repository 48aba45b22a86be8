"""The training program: interrupted runs, what it writes, and what it says to wrong use."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.configs import demo, gpt2, tiny
from experiments.run import cli
from experiments.run.config import default_config, read_config
from experiments.run.meter import NotFinite
from experiments.run.metrics import METRICS_FILE, SAMPLES_FILE, DamagedRows, Log, read_rows
from experiments.run.process import only_process
from experiments.run.progress import Progress
from experiments.run.run import prepare
from experiments.train import sample, train
from kernels.backends.choice import AUTO
from transformer import Config, load, presets
from transformer.storage.checkpoint import CheckpointError, Checkpoints
from transformer.training.flops import flops_per_token

ROOT = Path(__file__).parents[2]
RANDOM = np.random.default_rng()
STEPS, EVERY = 160, 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A glob of a few files of random words, fresh each time."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["".join(RANDOM.choice(list("abcdefgh"), RANDOM.integers(1, 8))) for _ in range(50)]
    for name in range(12):
        (folder / f"{name}.txt").write_text(" ".join(RANDOM.choice(words, 300)))
    return str(folder / "*.txt")


def settings(corpus, **changes):
    """Flags of a tiny run."""
    values = {
        "data.path": corpus,
        "data.batch_size": 8,
        "data.length": 32,
        "data.validation_fraction": 0.3,
        "model.num_layers": 1,
        "model.width": 32,
        "train.steps": STEPS,
        "train.log_every": 1,
        "train.eval_every": 40,
        "train.sample_every": 1000,
        "train.sample_length": 16,
        "train.ema_decay": 0.9,
        "checkpoint.every": EVERY,
        "checkpoint.keep_last": 3,
    }
    return values | {name.replace("__", "."): value for name, value in changes.items()}


def experiment(corpus, **changes):
    config = tiny.get_config()
    for name, value in settings(corpus, **changes).items():
        config.update_from_flattened_dict({name: value})
    return read_config(config)


def run_in_process(experiment, workdir):
    run = prepare(experiment, workdir)
    return run, train(run)


def start(workdir, corpus, *more, devices=1):
    """Starts the real command."""
    flags = [f"--config.{name}={value}" for name, value in settings(corpus).items()]
    config = f"--config={ROOT / 'experiments/configs/tiny.py'}"
    command = [sys.executable, "-m", "experiments.train", config, f"--workdir={workdir}"]
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*command, *flags, *more],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def signal_after(process, workdir, step, number):
    """Sends a signal once the metrics have a step; returns the output and the last step there."""
    path = workdir / METRICS_FILE
    while not (path.exists() and path.read_bytes().count(b"\n") > step):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate()
    return out, err, read_rows(path)[-1]["step"]


def exact(rows):
    """What must not differ by a bit between runs."""
    timing = {"tokens_per_second"}
    return [{name: row[name] for name in row if name not in timing} for row in rows]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    run, last = run_in_process(experiment(corpus), workdir)
    assert (run.start, last) == (0, STEPS)
    return workdir


def test_what_a_run_leaves(reference):
    rows = read_rows(reference / METRICS_FILE)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    names = {"step", "loss", "gradient_norm", "learning_rate", "tokens_per_second", "bits_per_byte"}
    assert all(set(row) == names for row in training)
    validation = [row for row in rows if "loss" not in row]
    assert [row["step"] for row in validation] == [40, 80, 120, 160]
    names = {"step", "validation_loss", "validation_bits_per_byte"}
    assert all(set(row) == names for row in validation)
    # Random words of eight letters: far from the 8 bits of a uniform guess, after a short while.
    assert validation[-1]["validation_bits_per_byte"] < 4.5
    assert [row["step"] for row in read_rows(reference / SAMPLES_FILE)] == [STEPS]
    assert (reference / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((reference / "tensorboard").iterdir())
    assert json.loads((reference / "experiment.json").read_text())["train"]["steps"] == STEPS


def test_the_model_of_a_run_is_its_best_average(reference):
    model = load(reference)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model.params
    )
    rows = [row for row in read_rows(reference / METRICS_FILE) if "validation_loss" in row]
    with Checkpoints(reference, read_only=True) as checkpoints:
        best = min((row["validation_loss"], row["step"]) for row in rows)[1]
        assert checkpoints.best_first[0] == best
        average = checkpoints.restore(lambda _: {"ema": target}, [best]).items["ema"]
    jax.tree.map(np.testing.assert_array_equal, model.params, average)


def test_interrupted_runs_equal_an_uninterrupted_one(corpus, reference, tmp_path):
    workdir = tmp_path / "run"
    out, err, terminated_at = signal_after(start(workdir, corpus), workdir, 30, signal.SIGTERM)
    assert f"stopped after step {terminated_at}" in out, err
    assert out.startswith("attention on a cpu runs on the backend 'xla'\n")
    assert 30 <= terminated_at < STEPS

    process = start(workdir, corpus)
    _, err, killed_at = signal_after(process, workdir, terminated_at + 45, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, err
    assert killed_at < STEPS

    run, last = run_in_process(experiment(corpus), workdir)
    # One interval, and what ran while the next checkpoint was being written: at most another.
    assert max(terminated_at, killed_at - 2 * EVERY) <= run.start <= killed_at
    assert last == STEPS
    assert exact(read_rows(workdir / METRICS_FILE)) == exact(read_rows(reference / METRICS_FILE))
    # The samples come from the same parameters.
    assert read_rows(workdir / SAMPLES_FILE) == read_rows(reference / SAMPLES_FILE)


def test_a_finished_run_says_its_result_and_does_nothing(corpus, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    process = start(reference, corpus)
    out, err = process.communicate()
    assert process.returncode == 0, err
    bits = read_rows(reference / METRICS_FILE)[-1]["validation_bits_per_byte"]
    assert out.startswith(f"finished after step {STEPS}") and f"{bits:.4f} bits per byte" in out
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    corpus, reference, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for path in (workdir / "checkpoints" / str(STEPS) / "params").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "transformer.storage.checkpoint"):
        run, last = run_in_process(experiment(corpus), workdir)
    assert (run.start, last) == (STEPS - EVERY, STEPS)
    assert f"{STEPS} is damaged" in caplog.text
    assert f"trying step {STEPS - EVERY}" in caplog.text
    assert exact(read_rows(workdir / METRICS_FILE)) == exact(read_rows(reference / METRICS_FILE))


def test_several_devices_give_the_same_losses(corpus, reference, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, corpus, "--config.train.data_parallel", devices=4)
    _, err, _ = signal_after(process, workdir, 20, signal.SIGTERM)
    assert process.returncode == 0, err
    rows = read_rows(workdir / METRICS_FILE)[:20]
    expected = read_rows(reference / METRICS_FILE)[:20]
    # Gradients are summed over the devices in another order: float32 rounding, grown over 20
    # steps whose updates Adam divides by small numbers.
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [row["loss"] for row in expected], rtol=1e-4
    )


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_good(corpus, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    run = prepare(
        experiment(corpus, train__steps=STEPS + 60, optimizer__learning_rate=1e30), workdir
    )
    assert run.start == STEPS
    with pytest.raises(NotFinite, match=r"step 16\d: the loss is .* norm is (nan|inf)"):
        train(run)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps[-1] == STEPS
    rows = read_rows(workdir / METRICS_FILE)
    assert all(np.isfinite(row.get("loss", 0)) for row in rows)
    load(workdir)


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(corpus, tmp_path, monkeypatch):
    run = prepare(experiment(corpus, train__steps=60), tmp_path)
    usage = shutil.disk_usage(tmp_path)
    left = iter([usage, usage._replace(free=10)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: next(left))
    with pytest.raises(CheckpointError, match=rf"could not save .* intact: {EVERY}\."):
        train(run)
    assert [row["step"] for row in read_rows(tmp_path / METRICS_FILE) if "loss" in row][-1] == 40
    load(tmp_path)


@pytest.mark.parametrize("attention", ["reference", "xla"])
def test_a_run_on_a_chosen_backend_of_attention_says_its_mfu(
    corpus, tmp_path, monkeypatch, attention
):
    monkeypatch.setattr(
        "kernels.backends.choice.AUTO", dict.fromkeys(AUTO, ())
    )  # "auto" would fail
    monkeypatch.setattr("experiments.run.meter.peak_flops", lambda device: 1e12)
    changes = {"train__steps": 2, "optimizer__warmup_steps": 1, "train__attention": attention}
    run, last = run_in_process(experiment(corpus, **changes), tmp_path)
    rows = [row for row in read_rows(tmp_path / METRICS_FILE) if "loss" in row]
    flops = flops_per_token(run.model, run.experiment.data.length)
    assert last == len(rows) == 2
    for row in rows:
        np.testing.assert_allclose(row["mfu"], row["tokens_per_second"] * flops / 1e12)


def test_a_sample_of_parameters_that_are_no_numbers(corpus, tmp_path):
    run = prepare(experiment(corpus), tmp_path)
    params = jax.tree.map(lambda x: x * np.nan, run.state.params)
    with pytest.raises(NotFinite, match=r"sample after step 7: the logits .* are not finite"):
        sample(run, params, 7)


def test_what_is_said_holds_no_control_characters(capsys):
    with Progress(0, 1) as progress:
        progress.say("a\nc\x1b[31m\r\x07\x9b\u00e9")
    assert capsys.readouterr().out == "a\nc\\x1b[31m\\x0d\\x07\\x9b\u00e9\n"


@pytest.mark.parametrize("every", ["eval_every", "sample_every"])
def test_a_signal_during_a_validation_or_a_sample_saves(corpus, tmp_path, monkeypatch, every):
    """What is said to be saved is."""

    def interrupted(function):
        def signalled(*args, **kwargs):
            signal.raise_signal(signal.SIGTERM)
            return function(*args, **kwargs)

        return signalled

    name = {"eval_every": "evaluate", "sample_every": "sample"}[every]
    module = sys.modules["experiments.train"]
    monkeypatch.setattr(module, name, interrupted(getattr(module, name)))
    assert run_in_process(experiment(corpus, **{f"train__{every}": 3}), tmp_path)[1] == 3
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [3]


def test_a_terminal_that_cannot_show_a_sample_ends_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start(tmp_path, corpus, "--config.train.steps=11", "--config.train.sample_length=64")
    out, err = process.communicate()
    assert process.returncode == 0, err
    [row] = read_rows(tmp_path / SAMPLES_FILE)
    assert not row["text"].isascii() and "\\ufffd" in out
    load(tmp_path)


def test_damaged_files_are_named(corpus, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    longer = experiment(corpus, train__steps=STEPS + 1)
    with open(workdir / METRICS_FILE, "a") as file:
        file.write('{"step": 3, garbage\n')
    with pytest.raises(DamagedRows, match=r"metrics\.jsonl, line \d+: '.*garbage' is no row"):
        train(prepare(longer, workdir))
    (workdir / "experiment.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"experiment\.json is damaged; remove it"):
        prepare(longer, workdir)
    (workdir / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
        prepare(longer, workdir)
    with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
        prepare(longer, workdir / "tokenizer.json")


def test_bytes_have_no_size_to_change(corpus, reference):
    assert prepare(experiment(corpus, data__vocab_size=999), reference) is None  # it is finished


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    with (
        only_process(tmp_path),
        pytest.raises(BlockingIOError, match="another process"),
        only_process(tmp_path),
    ):
        pass
    with only_process(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model__width": 48}, ValueError, "another architecture: width is 32 there and 48 here"),
        ({"data__tokenizer": "bpe"}, ValueError, r"data.tokenizer \(bytes -> bpe\) cannot change"),
        ({"optimizer__name": "muon"}, CheckpointError, "optimizer_state is laid out otherwise"),
        ({"data__path": "/nowhere/*.txt"}, OSError, "no file matches '/nowhere/"),
    ],
)
def test_a_run_goes_on_only_as_it_began(corpus, reference, changes, kind, message):
    with pytest.raises(kind, match=message):
        prepare(experiment(corpus, train__steps=STEPS + 1, **changes), reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "/nowhere/*.txt"}, "no file matches"),
        ({"data__length": 257}, "data.length=257 is more than config.model.max_length=256"),
        ({"train__accumulate": 3}, "batch_size=8 is no multiple of config.train.accumulate=3"),
        ({"train__steps": 10}, "warmup_steps=10 leaves nothing of 10 steps"),
        ({"train__ema_decay": 1.5}, "ema_decay=1.5; it must be above 0 and below 1"),
        ({"train__steps": 0}, "train.steps=0; it must be at least 1"),
        ({"checkpoint__keep_best": -1}, "keep_best=-1; it is 0 or more"),
        ({"data__tokenizer": "words"}, "'words' does not exist; choose bytes or bpe"),
        ({"data__seed": -1}, "seed is -1"),
        ({"train__seed": 2**40}, r"train.seed=1099511627776; it is between 0 and 2\*\*32 - 1"),
        ({"train__z_loss": float("nan")}, "train.z_loss=nan; it is a number from 0 on"),
        ({"train__attention": "fast"}, "attention backend 'fast' does not exist; choose .* xla"),
        ({"model__num_heads": 5}, "width=32 is no multiple of num_heads=5"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(corpus, tmp_path, changes, message):
    workdir = tmp_path / "run"
    with pytest.raises((ValueError, OSError), match=message):
        prepare(experiment(corpus, **changes), workdir)
    assert not workdir.exists()


def test_a_file_that_is_not_utf8(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text("text")
    (tmp_path / "g.txt").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=r"g\.txt is not UTF-8: byte 3 is 0xff"):
        prepare(experiment(str(tmp_path / "*.txt")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.stepz=3"], "unknown config field: 'stepz'"),
        (["--config.train.steps=many"], "invalid literal for int() with base 10: 'many'"),
        (["--config.data.path=/nowhere/*"], "no file matches '/nowhere/*'"),
        (["--config.train.attention=splash"], "attention backend 'splash': it runs on TPUs"),
    ],
)
def test_the_command_reports_wrong_use_in_one_line(tmp_path, corpus, flags, message):
    process = start(tmp_path / "run", corpus, *flags)
    out, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("no python", "config.py, line 1, is not Python"), ("steps = 3", "no function get_config")],
)
def test_a_config_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    flags = f"--config={path}", f"--workdir={tmp_path / 'run'}"
    command = [sys.executable, "-m", "experiments.train", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("module", [demo, gpt2, tiny])
def test_the_configs_are_whole(module):
    config = read_config(module.get_config())
    assert config.data.length <= config.architecture(vocab_size=300).max_length


@pytest.mark.parametrize("name", presets)
def test_a_preset_survives_being_a_config(name):
    config = read_config(default_config(presets[name]))
    assert config.architecture(presets[name].vocab_size) == presets[name]


def test_fields_that_derive_follow_what_they_derive_from():
    small = Config(vocab_size=9, max_length=256, num_layers=1, width=32, num_heads=2)
    config = default_config(small)
    config.model.width = 64
    model = read_config(config).architecture(9)
    assert (model.head_size, model.feed_forward_width) == (32, 256)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("model", "widht", 3, "config.model has no field 'widht'; did you mean width"),
        ("model", "vocab_size", 3, "config.model has no field 'vocab_size'"),
        ("model", "window", (1, "2"), "window=.* is of type tuple; it must be int"),
        ("model", "rotary_scaling", {"kind": "ntk", "factor": 2, "bta": 1}, "no field 'bta'"),
        ("model", "rotary_scaling", {"kind": "ntk"}, "rotary_scaling lacks factor"),
        ("optimizer", "clip_norm", True, "clip_norm=True is of type bool"),
        ("train", "ema_decay", "0.9", "ema_decay='0.9' is of type str"),
    ],
)
def test_a_config_file_with_a_wrong_field(section, name, value, message):
    config = tiny.get_config()
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        read_config(config)


def test_a_config_file_with_a_wrong_section():
    config = tiny.get_config()
    config.trian = {}
    with pytest.raises(ValueError, match="config has no field 'trian'; did you mean train"):
        read_config(config)
    with pytest.raises(ValueError, match="get_config returns 5; it returns a ConfigDict"):
        read_config(5)
    config = tiny.get_config()
    del config["train"]
    config.train = 3
    with pytest.raises(ValueError, match="train=3 is no section"):
        read_config(config)


def test_a_log_is_cut_after_a_step_and_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    texts = ["a", "line\u2028separator", "\ud7ff", "b\n"]
    with Log(path, 0) as log:
        for step, text in enumerate(texts, 1):
            log.write({"step": step, "text": text})
    path.write_bytes(path.read_bytes() + b'{"step": 5, "te')  # killed while it wrote
    with Log(path, 3) as log:
        log.write({"step": 4, "text": "new"})
        log.flush()
        assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert [row["text"] for row in read_rows(path)] == [*texts[:3], "new"]


def test_errors_of_the_user_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended, cli.user_errors(ValueError):
        raise ValueError("two\n  lines")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"
    with pytest.raises(SystemExit) as ended, cli.user_errors(NotFinite, status=1):
        raise NotFinite("step 3")
    assert ended.value.code == 1
    with pytest.raises(KeyError), cli.user_errors(ValueError):
        raise KeyError("a bug keeps its traceback")
