"""The training program: what it writes, interrupted runs, and what it says when it cannot go on."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.run.meter import NotFinite
from experiments.run.metrics import METRICS_FILE, SAMPLES_FILE, DamagedRows, read_rows
from experiments.run.prepare import prepare
from experiments.train import sample, train
from transformer import load
from transformer.storage.checkpoint import CheckpointError, Checkpoints

STEPS, EVERY = 160, 20  # of the fixture `reference`


def exact(rows):
    """What must not differ by a bit between runs."""
    timing = {"tokens_per_second"}
    return [{name: row[name] for name in row if name not in timing} for row in rows]


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
    checkpoints = Checkpoints(reference, read_only=True)
    best = min((row["validation_loss"], row["step"]) for row in rows)[1]
    assert checkpoints.best_first[0] == best
    average = checkpoints.restore(lambda _: {"ema": target}, [best]).items["ema"]
    jax.tree.map(np.testing.assert_array_equal, model.params, average)


def test_interrupted_runs_equal_an_uninterrupted_one(
    experiment, reference, start, signal_after, tmp_path
):
    workdir = tmp_path / "run"
    out, err, terminated_at = signal_after(start(workdir), workdir, 30)
    assert f"stopped after step {terminated_at}" in out, err
    assert out.startswith("attention on a cpu runs on the backend 'xla'\n")
    assert 30 <= terminated_at < STEPS

    process = start(workdir)
    _, err, killed_at = signal_after(process, workdir, terminated_at + 45, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, err
    assert killed_at < STEPS

    run = prepare(experiment(), workdir)
    # One interval, and what ran while the next checkpoint was being written: at most another.
    assert max(terminated_at, killed_at - 2 * EVERY) <= run.start <= killed_at
    assert train(run) == STEPS
    assert exact(read_rows(workdir / METRICS_FILE)) == exact(read_rows(reference / METRICS_FILE))
    # The samples come from the same parameters.
    assert read_rows(workdir / SAMPLES_FILE) == read_rows(reference / SAMPLES_FILE)


def test_a_finished_run_says_its_result_and_does_nothing(reference, command):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    result = command(reference)
    assert result.returncode == 0, result.stderr
    bits = read_rows(reference / METRICS_FILE)[-1]["validation_bits_per_byte"]
    assert result.stdout.startswith(f"finished after step {STEPS}")
    assert f"{bits:.4f} bits per byte" in result.stdout
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    experiment, reference, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for path in (workdir / "checkpoints" / str(STEPS) / "params").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "transformer.storage.checkpoint"):
        run = prepare(experiment(), workdir)
    assert (run.start, train(run)) == (STEPS - EVERY, STEPS)
    assert f"{STEPS} is damaged and left out (params: the array " in caplog.text
    assert exact(read_rows(workdir / METRICS_FILE)) == exact(read_rows(reference / METRICS_FILE))


def test_a_damaged_checkpoint_is_one_line_in_the_terminal(reference, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    damaged = workdir / "checkpoints" / str(STEPS)
    for path in (damaged / "params" / "d").iterdir():
        path.unlink()
    result = command(workdir)
    assert result.returncode == 0
    [line] = result.stderr.splitlines()
    reason = "params: the array embedding cannot be read"
    assert line == f"warning: checkpoint {damaged} is damaged and left out ({reason})"
    assert f"step {STEPS - EVERY + 1}/{STEPS}" in result.stdout


def test_a_changed_optimizer_is_one_line_with_the_remedy(reference, command):
    changes = {"train__steps": STEPS + 1, "train__ema_decay": None, "optimizer__name": "muon"}
    result = command(reference, **changes)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line == (
        f"error: {reference}/checkpoints/{STEPS} is whole, but its optimizer_state holds other "
        "arrays. config.optimizer.name was adamw and is muon. Go on with "
        "--config.optimizer.name=adamw, or begin anew in another --workdir."
    )


def test_a_reader_that_leaves_costs_no_steps(start, tmp_path):
    process = start(tmp_path, train__steps=25)
    assert process.stdout.readline() == "attention on a cpu runs on the backend 'xla'\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert read_rows(tmp_path / METRICS_FILE)[-1]["step"] == 25
    load(tmp_path)


def test_an_odd_corpus_no_place_for_a_cache_and_a_poor_terminal(start, tmp_path):
    """One file, loops of links that lead to it, and a run that is shorter than its warm-up."""
    corpus, workdir = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    (corpus / "book.txt").write_text("".join(f"line {n} of the book\n" for n in range(1000)))
    for name in ("one", "two"):
        (corpus / name).symlink_to(corpus)
    (tmp_path / "cache").touch()
    process = start(
        workdir,
        data__path=f"{corpus}/**/*.txt",
        data__tokenizer="bpe",
        data__vocab_size=300,
        train__steps=9,
        train__sample_length=64,
        environment={"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONIOENCODING": "ascii"},
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    left_out, cache = err.splitlines()
    assert left_out.startswith("warning: left out of the corpus ")
    assert left_out.endswith(": 2 links to a folder that is read already")
    assert cache.startswith("warning: the tokenizer is not kept for the next run: ")
    assert f"{tmp_path / 'cache'}/unison/bpe-300-" in cache
    warmup, cut, *_ = out.splitlines()
    assert warmup == (
        "config.optimizer.warmup_steps=10 leaves nothing of config.train.steps=9; the warm-up is "
        "shortened to 2 steps"
    )
    assert cut.startswith("the corpus is one document, which is cut into ")
    assert "config.data.separator" in cut
    assert "finished after step 9" in out
    # A model that knows so little writes bytes that are not text.
    [row] = read_rows(workdir / SAMPLES_FILE)
    assert not row["text"].isascii() and "\\ufffd" in out
    load(workdir)


@pytest.fixture
def full_disk(tmp_path):
    """The folder of a disk without any space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only the superuser can mount a small disk")
    with open(disk / "filling", "wb") as file:
        file.write(bytes(16 * 1024))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_from_the_start_is_one_line(full_disk, command):
    result = command(full_disk / "run")
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {full_disk}/run/")
    assert line.endswith(
        ": No space left on device; free some space there, and run the same command again."
    )


def test_a_disk_that_becomes_full_ends_the_run_and_keeps_what_was_saved(
    experiment, tmp_path, monkeypatch
):
    run = prepare(experiment(train__steps=60), tmp_path)
    usage = shutil.disk_usage(tmp_path)
    left = iter([usage, usage._replace(free=10)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: next(left))
    with pytest.raises(CheckpointError, match=rf"could not save .* intact: {EVERY}\."):
        train(run)
    assert [row["step"] for row in read_rows(tmp_path / METRICS_FILE) if "loss" in row][-1] == 40
    load(tmp_path)


def test_several_devices_give_the_same_losses(reference, start, signal_after, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, "--config.devices.mesh=fsdp=-1", devices=2)
    _, err, _ = signal_after(process, workdir, 20)
    assert process.returncode == 0, err
    rows = read_rows(workdir / METRICS_FILE)[:20]
    expected = read_rows(reference / METRICS_FILE)[:20]
    # Gradients are summed over the devices in another order: float32 rounding, grown over 20
    # steps whose updates Adam divides by small numbers.
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [row["loss"] for row in expected], rtol=1e-4
    )


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(
    experiment, reference, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    run = prepare(experiment(train__steps=STEPS + 60, optimizer__learning_rate=1e30), workdir)
    assert run.start == STEPS
    with pytest.raises(NotFinite, match=r"step 16\d: the loss is .* norm is (nan|inf)"):
        train(run)
    assert Checkpoints(workdir, read_only=True).steps[-1] == STEPS
    rows = read_rows(workdir / METRICS_FILE)
    assert all(np.isfinite(row.get("loss", 0)) for row in rows)
    load(workdir)


def test_a_sample_of_parameters_that_are_not_finite(experiment, tmp_path):
    run = prepare(experiment(), tmp_path)
    params = jax.tree.map(lambda x: x * np.nan, run.state.params)
    with pytest.raises(NotFinite, match=r"sample after step 7: the logits .* are not finite"):
        sample(run, params, 7)


@pytest.mark.parametrize("every", ["eval_every", "sample_every"])
def test_a_signal_during_a_validation_or_a_sample_saves(experiment, tmp_path, monkeypatch, every):
    """What is said to be saved is."""

    def interrupted(function):
        def signalled(*args, **kwargs):
            signal.raise_signal(signal.SIGTERM)
            return function(*args, **kwargs)

        return signalled

    name = {"eval_every": "evaluate", "sample_every": "sample"}[every]
    module = sys.modules["experiments.train"]
    monkeypatch.setattr(module, name, interrupted(getattr(module, name)))
    assert train(prepare(experiment(**{f"train__{every}": 3}), tmp_path)) == 3
    assert Checkpoints(tmp_path, read_only=True).steps == [3]


def test_damaged_rows_are_named(experiment, reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    with open(workdir / METRICS_FILE, "a") as file:
        file.write('{"step": 3, garbage\n')
    with pytest.raises(DamagedRows, match=r"metrics\.jsonl, line \d+: '.*garbage' is not a row"):
        train(prepare(experiment(train__steps=STEPS + 1), workdir))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.stepz=3", "unknown field config.train.stepz; did you mean config.train."),
        ("--config.data.path=/nowhere/*", "no file matches '/nowhere/*'"),
        ("--config.train.attention=splash", "attention backend 'splash': it runs on TPUs"),
    ],
)
def test_the_command_reports_wrong_use_in_one_line(tmp_path, command, flag, message):
    result = command(tmp_path / "run", flag)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not result.stdout
    assert not (tmp_path / "run").exists()
