"""Trains a model: `python -m experiments.train --config=FILE --workdir=DIR`.

Single fields of the config are changed as --config.train.steps=N. Run again with the same work
directory, it goes on from the last checkpoint; SIGTERM and Ctrl-C save one and end the run.

The work directory holds config.json, tokenizer.json and checkpoints/ (`transformer.load` reads
these), experiment.json (the config), metrics.jsonl, tensorboard/, loss.png and samples.jsonl.
"""

import fcntl
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from grain import DatasetIterator
from ml_collections import config_flags

from experiments import cli
from experiments.config import Data, Experiment, read_config
from experiments.metrics import METRICS_FILE, SAMPLES_FILE, Log, Metrics, read_rows
from experiments.progress import Progress
from transformer.checkpoint import FOLDER, CheckpointError, Checkpoints
from transformer.config import Config
from transformer.data import Batch, Document, read_corpus, split, train_batches, validation_batches
from transformer.generate import generate
from transformer.model import (
    CONFIG_FILE,
    Model,
    require_same_architecture,
    write_description,
    write_json,
)
from transformer.optimizer import learning_rate, make_optimizer
from transformer.sharding import make_mesh, shard_batch, state_shardings
from transformer.tokenizer import Tokenizer, byte_tokenizer, cached_bpe
from transformer.train import (
    TrainState,
    evaluate,
    flops_per_token,
    init_state,
    make_eval_step,
    make_train_step,
    peak_flops,
)

EXPERIMENT_FILE = "experiment.json"
# Steps given to the device before the result of the oldest is waited for: the host's work hides
# behind the device's, and a stop or a loss that is no number is noticed soon.
IN_FLIGHT = 2

_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/demo.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


class NotFinite(Exception):
    """The loss or its gradient is no longer a number."""


@dataclass(frozen=True)
class Run:
    """All that a run is made of, ready to start.

    model: the architecture. start: steps done before. shard: lays a batch on the devices.
    train_step: compiled. state: after `start` steps; `train_step` takes it over.
    """

    experiment: Experiment
    workdir: Path
    model: Config
    tokenizer: Tokenizer
    start: int
    state: TrainState
    train_step: Callable
    batches: DatasetIterator
    validation: Sequence[Batch]
    shard: Callable[[Batch], Batch]


def main(argv):
    """Prepares the run that the flags ask for, and does it unless it is finished."""
    del argv
    workdir = Path(_WORKDIR.value)
    with cli.user_errors(ValueError, OSError, CheckpointError):
        run = prepare(read_config(_CONFIG.value), workdir)
    if run is not None:
        with cli.user_errors(NotFinite, OSError, CheckpointError, status=1):
            step = train(run)
        if step < run.experiment.train.steps:
            print(f"stopped after step {step}; the same command goes on from there")
            return
    validated = [row for row in read_rows(workdir / METRICS_FILE) if "validation_loss" in row][-1]
    print(
        f"finished after step {validated['step']}: validation loss "
        f"{validated['validation_loss']:.4f}, {validated['validation_bits_per_byte']:.4f} bits "
        f"per byte; the model is in {workdir}"
    )


def prepare(experiment: Experiment, workdir: Path) -> Run | None:
    """Makes a run ready, new or to be continued; None where it is finished.

    Writes nothing but the cache of tokenizers.

    Raises:
      ValueError, OSError: the config, the corpus or the work directory cannot be used.
      CheckpointError: the work directory has checkpoints, and none is good.
    """
    data, options = experiment.data, experiment.train
    training, held_out = split(read_corpus(data.path), data.validation_fraction)
    begun = (workdir / CONFIG_FILE).exists()
    tokenizer = Tokenizer.load(workdir) if begun else make_tokenizer(data, training)
    model = experiment.architecture(tokenizer.vocab_size)
    if begun:
        require_same_architecture(workdir, model)
        tell_changes(workdir, experiment)

    optimizer = make_optimizer(experiment.optimizer, options.steps)
    init = partial(init_state, model, optimizer, ema_decay=options.ema_decay)
    key = jax.random.key(options.seed)
    mesh = make_mesh(None if options.data_parallel else jax.devices()[:1])
    shardings = state_shardings(mesh, jax.eval_shape(init, key))
    start, state, data_state = 0, None, None
    if (workdir / FOLDER).exists():
        start, state, data_state = restore(workdir, jax.eval_shape(init, key), shardings)
        if start >= options.steps:
            return None
    if state is None:
        state = jax.jit(init, out_shardings=shardings)(key)

    batches = iter(train_batches(training, tokenizer, data.batch_size, data.length, data.seed))
    if data_state is not None:
        batches.set_state(data_state)
    shard = partial(shard_batch, mesh)
    validation = validation_batches(held_out, tokenizer, data.batch_size, data.length)
    validation = [shard(batch) for batch in validation]
    train_step = make_train_step(
        model,
        optimizer,
        accumulate=options.accumulate,
        z_loss=options.z_loss,
        ema_decay=options.ema_decay,
        state_shardings=shardings,
    )
    train_step = train_step.lower(state, validation[0]).compile()
    return Run(
        experiment, workdir, model, tokenizer, start, state, train_step, batches, validation, shard
    )


def make_tokenizer(data: Data, training: Sequence[Document]) -> Tokenizer:
    """Bytes, or BPE trained on the training documents and kept in the user's cache folder."""
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unison"
    return cached_bpe([document.text for document in training], data.vocab_size, cache)


def tell_changes(workdir: Path, experiment: Experiment) -> None:
    """Prints which settings differ from those that the run had so far.

    Raises:
      ValueError: the tokenizer is among them.
    """
    path = workdir / EXPERIMENT_FILE
    before = json.loads(path.read_text()) if path.exists() else {}
    now = json.loads(json.dumps(experiment.to_dict()))
    changes = {
        f"{section}.{name}": f"{before[section].get(name)} -> {value}"
        for section in before
        for name, value in now[section].items()
        if before[section].get(name) != value
    }
    for name in ("data.tokenizer", "data.vocab_size"):
        if name in changes:
            raise ValueError(
                f"config.{name} ({changes[name]}) cannot change within a run, whose tokenizer is "
                f"in {workdir}; use another work directory."
            )
    for name, change in changes.items():
        print(f"changed since the run was last started: config.{name}: {change}")


def restore(workdir: Path, abstract: TrainState, shardings: TrainState):
    """The newest good checkpoint: its step, the state and the state of the data.

    Without a checkpoint the step is 0, and the others are None.
    """
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    with Checkpoints(workdir, read_only=True) as checkpoints:
        if not checkpoints.steps:
            return 0, None, None
        restored = checkpoints.restore(lambda _: _items(target), reversed(checkpoints.steps))
    step = jax.device_put(np.int32(restored.step), shardings.step)
    return restored.step, TrainState(step, **restored.items), restored.metadata["data"]


def _items(state):
    """What a checkpoint holds of a state, whose step is the checkpoint's own."""
    names = ("params", "optimizer_state", "ema")
    items = {name: getattr(state, name) for name in names}
    return {name: tree for name, tree in items.items() if tree is not None}


def train(run: Run) -> int:
    """Does the run, to its end or until SIGTERM or SIGINT; what came before is kept.

    Returns:
      The last step, whose state is saved.

    Raises:
      NotFinite: a loss or gradient is no number; says at which step.
      CheckpointError, OSError: something could not be written.
    """
    options, every = run.experiment.train, run.experiment.checkpoint.every
    run.workdir.mkdir(parents=True, exist_ok=True)
    kept = {
        "keep_last": run.experiment.checkpoint.keep_last,
        "keep_best": run.experiment.checkpoint.keep_best,
    }
    with (
        only_process(run.workdir),
        Checkpoints(run.workdir, **kept) as checkpoints,
        Metrics(run.workdir, run.start) as metrics,
        Log(run.workdir / SAMPLES_FILE, run.start) as samples,
        Progress(run.start, options.steps) as progress,
        StopSignals() as stop,
    ):
        write_json(run.workdir / EXPERIMENT_FILE, run.experiment.to_dict())
        write_description(run.workdir, run.model, run.tokenizer)
        checkpoints.discard_after(run.start)
        meter = Meter(run, metrics, progress)
        eval_step = make_eval_step(run.model)
        state = run.state
        for step in range(run.start + 1, options.steps + 1):
            batch = next(run.batches)
            state, values = run.train_step(state, run.shard(batch))
            meter.push(step, values, batch)
            is_last = step == options.steps
            validates = is_last or step % options.eval_every == 0
            writes_sample = is_last or step % options.sample_every == 0
            saves = is_last or step % every == 0 or stop.requested
            if not (validates or writes_sample or saves):
                continue
            validation = {}
            with meter.pause():
                averaged = state.params if state.ema is None else state.ema
                if validates:
                    sizes = run.tokenizer.byte_lengths
                    validation = evaluate(eval_step, averaged, run.validation, sizes)
                    metrics.write({"step": step, **validation})
                    bits = validation["validation_bits_per_byte"]
                    progress.say(
                        f"step {step}/{options.steps}  validation loss "
                        f"{validation['validation_loss']:.4f}  {bits:.4f} bits per byte"
                    )
                if writes_sample:
                    text = sample(run, averaged, seed=step)
                    samples.write({"step": step, "text": text})
                    progress.say(f"sample after step {step}:\n{text}")
                if saves:
                    # Rows first: a checkpoint that is there has all rows up to its step.
                    metrics.flush()
                    samples.flush()
                    remembered = {
                        "data": run.batches.get_state(),
                        "config": run.experiment.to_dict(),
                    }
                    loss = validation.get("validation_loss")
                    checkpoints.save(step, _items(state), remembered, loss)
            if stop.requested:
                break
    return step


@contextmanager
def only_process(workdir: Path):
    """Keeps other processes from training in a directory until the body, or this process, ends.

    Raises:
      BlockingIOError: another one is.
    """
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is training in {workdir}") from None
        yield


def sample(run: Run, params, seed: int) -> str:
    """The beginning of a document as the model would write it."""
    model = Model(run.model, jax.device_put(params, jax.devices()[0]), run.tokenizer)
    length = min(run.experiment.train.sample_length, run.model.max_length - 1)
    prompt = [run.tokenizer.end_of_document]
    return generate(model, [prompt], max_new_tokens=length, seed=seed)[0].text


class Meter:
    """Turns the results of steps into rows of metrics, a few steps late."""

    def __init__(self, run: Run, metrics: Metrics, progress: Progress):
        self._metrics, self._progress = metrics, progress
        self._steps, self._log_every = run.experiment.train.steps, run.experiment.train.log_every
        self._learning_rate = learning_rate(run.experiment.optimizer, self._steps)
        self._byte_lengths = run.tokenizer.byte_lengths
        devices = run.state.step.sharding.device_set
        peaks = [peak_flops(device) for device in devices]
        self._peak = None if None in peaks else sum(peaks)
        self._flops = flops_per_token(run.model, run.experiment.data.length)
        self._pending = deque()
        self._tokens, self._since = 0, time.perf_counter()
        self._saved_in = run.workdir

    def push(self, step: int, values: dict, batch: Batch) -> None:
        """Takes a step that was given to the device, and writes those before that are done."""
        self._pending.append((step, values, batch))
        while len(self._pending) > IN_FLIGHT:
            self._settle()

    @contextmanager
    def pause(self):
        """Writes all steps so far, and leaves the body's time out of tokens per second."""
        while self._pending:
            self._settle()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _settle(self):
        step, values, batch = self._pending.popleft()
        values = jax.device_get(values)
        if not values["finite"]:
            raise NotFinite(
                f"step {step}: the loss is {values['loss']} and the gradient's norm is "
                f"{values['gradient_norm']}; stopped. The checkpoints in {self._saved_in} are of "
                "steps before; a lower learning rate or a longer warm-up may help."
            )
        self._tokens += batch.tokens.size
        self._progress.advance(step)
        if step % self._log_every == 0 or step == self._steps:
            self._write(step, values, batch)

    def _write(self, step, values, batch):
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        loss, weights = float(values["loss"]), batch.weights
        size = np.sum(self._byte_lengths[batch.targets] * weights)
        row = {
            "step": step,
            "loss": loss,
            "gradient_norm": float(values["gradient_norm"]),
            "learning_rate": float(self._learning_rate(step - 1)),
            "tokens_per_second": rate,
            "bits_per_byte": loss * float(np.sum(weights) / size) / math.log(2),
        }
        if self._peak is not None:
            row["mfu"] = rate * self._flops / self._peak
        self._metrics.write(row)
        self._progress.show(row, (self._steps - step) * batch.tokens.size / rate)


class StopSignals:
    """SIGTERM and SIGINT as a request; the second SIGINT interrupts at once. A context manager."""

    def __init__(self):
        self.requested = False

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        del number, frame
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    cli.run(main)
