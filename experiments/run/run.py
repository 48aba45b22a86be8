"""A run of training, made ready: new, or where its last checkpoint left it."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from grain import DatasetIterator

from experiments.run.config import Data, Experiment
from transformer.config import Config
from transformer.data.batches import Batch, train_batches, validation_batches
from transformer.data.corpus import Document, read_corpus, split
from transformer.data.tokenizer import Tokenizer, byte_tokenizer, cached_bpe
from transformer.devices.mesh import make_mesh, shard_batch, state_shardings
from transformer.storage.checkpoint import FOLDER, Checkpoints
from transformer.storage.model import CONFIG_FILE, require_same_architecture
from transformer.training.optimizer import make_optimizer
from transformer.training.step import TrainState, init_state, make_train_step

EXPERIMENT_FILE = "experiment.json"


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


def prepare(experiment: Experiment, workdir: Path) -> Run | None:
    """Makes a run ready, new or to be continued; None where it is finished.

    Writes nothing but the cache of tokenizers.

    Raises:
      ValueError, OSError: the config, the corpus or the work directory cannot be used.
      CheckpointError: the work directory has checkpoints, and none is good.
      NotImplementedError: the backend of attention cannot train this model here.
    """
    data, options = experiment.data, experiment.train
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file; give a directory.")
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

    batches = train_batches(
        training,
        tokenizer,
        data.batch_size,
        data.length,
        data.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    batches = iter(batches)
    if data_state is not None:
        batches.set_state(data_state)
    shard = partial(shard_batch, mesh)
    validation = validation_batches(held_out, tokenizer, data.batch_size, data.length)
    validation = [shard(batch) for batch in validation]
    train_step = make_train_step(
        model,
        optimizer,
        attention=options.attention,
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
    before = _read_experiment(path) if path.exists() else {}
    now = json.loads(json.dumps(experiment.to_dict()))
    changes = {
        f"{section}.{name}": f"{before[section].get(name)} -> {value}"
        for section in before
        for name, value in now.get(section, {}).items()
        if before[section].get(name) != value
    }
    kinds = {section.get("tokenizer") for section in (before.get("data", {}), now["data"])}
    for name in ("data.tokenizer", "data.vocab_size"):
        if name in changes and kinds != {"bytes"}:  # which have no size to choose
            raise ValueError(
                f"config.{name} ({changes[name]}) cannot change within a run, whose tokenizer is "
                f"in {workdir}; use another work directory."
            )
    for name, change in changes.items():
        print(f"changed since the run was last started: config.{name}: {change}")


def _read_experiment(path):
    with contextlib.suppress(ValueError):
        sections = json.loads(path.read_text())
        if isinstance(sections, dict) and all(isinstance(s, dict) for s in sections.values()):
            return sections
    raise ValueError(f"{path} is damaged; remove it, and the run goes on with the config given.")


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
        restored = checkpoints.restore(
            lambda _: checkpoint_items(target), reversed(checkpoints.steps)
        )
    step = jax.device_put(np.int32(restored.step), shardings.step)
    return restored.step, TrainState(step, **restored.items), restored.metadata["data"]


def checkpoint_items(state: TrainState) -> dict:
    """What a checkpoint holds of a state, whose step is the checkpoint's own."""
    names = ("params", "optimizer_state", "ema")
    items = {name: getattr(state, name) for name in names}
    return {name: tree for name, tree in items.items() if tree is not None}
