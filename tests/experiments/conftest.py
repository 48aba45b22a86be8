"""A tiny training run: its config, in this process or as people start it, and one that is done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.configs import tiny
from experiments.run.config import read_config
from experiments.run.metrics import METRICS_FILE, read_rows
from experiments.run.prepare import prepare
from transformer import Model, init_params, presets, save
from transformer.data.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
FORKING = Path(__file__).with_name("forking.py")
PROGRAM = [sys.executable, "-m", "experiments.train"]
STEPS, EVERY = 160, 20


@pytest.fixture(scope="session")
def run_source(tmp_path_factory):
    """run_source(text, *flags) runs a program to its end: its returncode, stdout and stderr.

    As in a process of its own; but importing JAX and others takes seconds, and is done once.
    """
    pipe, files = subprocess.PIPE, tmp_path_factory.mktemp("printed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, FORKING]
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run_source(source, *arguments, folder=ROOT, **changes):
        request = {"source": source, "arguments": arguments, "folder": str(folder)}
        request["environment"] = os.environ | changes
        printed = {name: files / name for name in ("out", "err")}
        for name, path in printed.items():
            path.write_bytes(b"")
            request[name] = str(path)
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, err = (path.read_text(encoding="utf-8") for path in printed.values())
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    yield run_source
    server.communicate()


@pytest.fixture(scope="session")
def run_program(run_source):
    """run_program("experiments.sample", *flags) is `python -m experiments.sample` with flags."""

    def run_program(name, *flags, **options):
        source = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
        return run_source(source, *flags, **options)

    return run_program


def settings(corpus, **changes):
    """The fields of a tiny run, by their names; train__steps=3 changes one."""
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


def flags_of(corpus, workdir, **changes):
    """The flags of a tiny run."""
    given = settings(corpus, **changes).items()
    given = [f"--config.{name}={value}" for name, value in given if value is not None]
    return f"--config={ROOT / 'experiments/configs/tiny.py'}", f"--workdir={workdir}", *given


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, seed):
    """A glob of a few files of random words."""
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("corpus")
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 8))) for _ in range(50)]
    for name in range(12):
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(words, 300)))
    return str(folder / "*.txt")


@pytest.fixture(scope="session")
def experiment(corpus):
    """A function that makes the experiment of a tiny run, with changes."""

    def make(**changes):
        config = tiny.get_config()
        for name, value in settings(corpus, **changes).items():
            config.update_from_flattened_dict({name: value})
        return read_config(config)

    return make


@pytest.fixture(scope="session")
def start(corpus):
    """A function that starts the command with the flags of a tiny run, and more."""

    def start(workdir, *flags, devices=1, environment=(), **changes):
        xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            [*PROGRAM, *flags_of(corpus, workdir, **changes), *flags],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"} | dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def command(run_program, corpus):
    """A function that runs the command to its end: its status and what it printed."""

    def command(workdir, *flags, **changes):
        return run_program("experiments.train", *flags_of(corpus, workdir, **changes), *flags)

    return command


@pytest.fixture(scope="session")
def signal_after():
    """A function that sends a signal once the metrics have a step.

    It returns what was printed to stdout and stderr, and the last step of the metrics.
    """

    def signal_after(process, workdir, step, number=signal.SIGTERM):
        path = workdir / METRICS_FILE
        while not (path.exists() and path.read_bytes().count(b"\n") > step):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate()
        return out, err, read_rows(path)[-1]["step"]

    return signal_after


@pytest.fixture(scope="session")
def model():
    """A model of one layer, for programs that take a work directory."""
    config = presets["tiny"].replace(num_layers=1, width=32, feed_forward_width=64)
    return Model(config, init_params(config, jax.random.key(0)), byte_tokenizer())


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    """The directory where the model is saved."""
    path = tmp_path_factory.mktemp("model") / "model"
    save(model, path)
    return path


@pytest.fixture(scope="session")
def reference(experiment, tmp_path_factory):
    """The work directory of an uninterrupted run."""
    from experiments.train import train

    workdir = tmp_path_factory.mktemp("reference") / "run"
    run = prepare(experiment(), workdir)
    assert (run.start, train(run)) == (0, STEPS)
    return workdir
