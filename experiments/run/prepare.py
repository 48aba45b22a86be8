"""A training run, made ready: new, or where its last checkpoint left it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from grain import DatasetIterator
from jax.sharding import Mesh

from experiments.run.changes import explain_layout, report_changes, require_same_tokenizer
from experiments.run.config import Data, Devices, Experiment, Train, named_in_full
from transformer.config import Config
from transformer.data.batches import Batch, train_batches, validation_batches
from transformer.data.corpus import read_corpus
from transformer.data.documents import Document, counted, cut, default_length
from transformer.data.split import split
from transformer.data.tokenizer import Tokenizer, byte_tokenizer, cached_bpe
from transformer.devices import hosts
from transformer.devices.layout import (
    param_shardings,
    process_rows,
    shard_batch,
    shard_params,
    shard_rows,
    state_shardings,
)
from transformer.devices.mesh import make_mesh
from transformer.files import cache_folder
from transformer.program.params import Params
from transformer.storage.arrays import checksum
from transformer.storage.checkpoint import FOLDER, CheckpointError, Checkpoints, LayoutError
from transformer.storage.model import (
    CONFIG_FILE,
    Model,
    load,
    read_config,
    require_same_architecture,
)
from transformer.training.lora import Adapters, LoraConfig, init_adapters, merged
from transformer.training.optimizer import OptimizerConfig, make_optimizer, transferred
from transformer.training.step import TrainState, first_state, init_state, make_train_step


@dataclass(frozen=True)
class TrainingRun:
    """All that a training run is made of, ready to start.

    model: the architecture. mesh: the devices. start: how many steps were done before. batches:
    this process's rows of each batch. shard: lays them on the mesh. train_step: compiled. state:
    after `start` steps; `train_step` takes it over.
    """

    experiment: Experiment
    workdir: Path
    model: Config
    tokenizer: Tokenizer
    mesh: Mesh
    start: int
    state: TrainState
    train_step: Callable
    batches: DatasetIterator
    validation: Sequence[Batch]
    shard: Callable[[Batch], Batch]


def prepare(experiment: Experiment, workdir: Path) -> TrainingRun | None:
    """Makes a run ready, new or to be continued; returns None where it is finished.

    It writes nothing but the cache of tokenizers, and prints what differs from what was asked for.

    Raises:
      ValueError, OSError: the config, the corpus or the work directory cannot be used.
      CheckpointError: the work directory has checkpoints, and none can be used.
      NotImplementedError: the backend of attention cannot train this model here.
    """
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file; give a directory.")
    experiment = shorten_warmup(experiment)
    data, options = experiment.data, experiment.train
    with named_in_full("data", Data):
        training, held_out = split(read_documents(data), data.validation_fraction)
    begun = (workdir / CONFIG_FILE).exists()
    steps = Checkpoints(workdir, read_only=True).steps if begun else []
    hosts.require_same("the config", experiment)
    hosts.require_same(f"what --workdir={workdir} holds", steps)
    hosts.require_same("the corpus", [(text.name, len(text.text)) for text in training])
    adapts = experiment.lora.rank is not None
    needed = experiment.init.path is not None and (adapts or not steps)
    given = given_model(experiment) if needed else None
    if begun:
        tokenizer = Tokenizer.load(workdir)
    else:
        with named_in_full("data", Data):
            tokenizer = given.tokenizer if given else make_tokenizer(data, training)
    model = architecture(experiment, tokenizer, given.config if given else None, workdir)
    if begun:
        require_same_architecture(workdir, model)
        require_same_tokenizer(workdir, experiment)
        report_changes(workdir, experiment)

    with named_in_full("optimizer", OptimizerConfig):
        optimizer = make_optimizer(experiment.optimizer, options.steps, model.width)
    key = jax.random.key(options.seed)
    base = given.params if adapts else None

    def init(key):
        if base is None:
            prepared = partial(transferred, experiment.optimizer)
            return init_state(model, optimizer, key, options.ema_decay, prepared)
        adapters = init_adapters(experiment.lora, base, key)
        return first_state(adapters, optimizer, options.ema_decay)

    with named_in_full("lora", LoraConfig):
        abstract = jax.eval_shape(init, key)
    with named_in_full("devices", Devices):
        mesh = make_mesh(experiment.devices.mesh)
    shardings = state_shardings(mesh, abstract)
    base_shardings = None if base is None else param_shardings(mesh, base)
    with named_in_full("train", Train):
        train_step = make_step(options, model, optimizer, shardings.replace(base=base_shardings))
    start, state, remembered = 0, None, {}
    if (workdir / FOLDER).exists():
        start, state, remembered = restore(workdir, abstract, shardings, experiment)
        if start >= options.steps:
            return None
    if state is None and (given is None or adapts):
        state = jax.jit(init, out_shardings=shardings)(key)
    elif state is None:
        begin = partial(first_state, optimizer=optimizer, ema_decay=options.ema_decay)
        params = shard_params(mesh, given.params)
        state = jax.jit(begin, out_shardings=shardings)(params)
    if base is not None:
        state = state.replace(base=shard_params(mesh, base))
        require_same_base(remembered, state.base, experiment.init.path)

    with named_in_full("data", Data):
        index, count = process_rows(mesh, data.batch_size)
        batches = train_batches(
            training,
            tokenizer,
            data.batch_size // count,
            data.length,
            data.seed,
            shard_index=index,
            shard_count=count,
            chat=data.chat,
        )
        validation = validation_batches(
            held_out, tokenizer, data.batch_size, data.length, chat=data.chat
        )
    batches = iter(batches)
    if remembered:
        batches.set_state(remembered["data"])
    with jax.set_mesh(mesh):
        train_step = train_step.lower(state, shard_batch(mesh, validation[0])).compile()
    return TrainingRun(
        experiment=experiment,
        workdir=workdir,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        start=start,
        state=state,
        train_step=train_step,
        batches=batches,
        validation=validation,
        shard=partial(shard_rows, mesh, data.batch_size),
    )


def make_step(
    options: Train, model: Config, optimizer: optax.GradientTransformation, shardings: TrainState
) -> Callable:
    """The training step that a config's section says, on a mesh where the state lies so."""
    return make_train_step(
        model,
        optimizer,
        numerics=options.numerics,
        attention=options.attention,
        accumulate=options.accumulate,
        loss_parts=options.loss_parts,
        z_loss=options.z_loss,
        ema_decay=options.ema_decay,
        state_shardings=shardings,
    )


def given_model(experiment: Experiment) -> Model:
    """The model that a run starts from, its parameters in float32; prints what is then not used.

    Raises:
      ValueError, OSError, CheckpointError: it cannot be loaded, or has no tokenizer to train with.
    """
    path = experiment.init.path
    model = load(path, dtype="float32")
    if model.tokenizer is None or model.tokenizer.end_of_document is None:
        lacks = "no tokenizer" if model.tokenizer is None else "a tokenizer that never ends a text"
        raise ValueError(f"config.init.path={path!r}: the model has {lacks}; it needs one.")
    print(
        f"the model and its tokenizer are those of {path}; of config.model only dtype and remat "
        "are used"
    )
    return model


def architecture(
    experiment: Experiment, tokenizer: Tokenizer, given: Config | None, workdir: Path
) -> Config:
    """The architecture of a run: what its config says, or that of the model it starts from.

    Args:
      given: of the model it starts from; None: it is in the work directory, if there is one.
    """
    own = experiment.architecture(tokenizer.vocab_size)
    if experiment.init.path is None:
        return own
    model = (given or read_config(workdir)).replace(dtype=own.dtype, remat=own.remat)
    experiment.require_room(model, "the model's max_length")
    return model


def shorten_warmup(experiment: Experiment) -> Experiment:
    """The experiment with a warm-up that leaves steps to train after it; prints what it changes."""
    steps, warmup = experiment.train.steps, experiment.optimizer.warmup_steps
    if warmup < steps:
        return experiment
    shorter = steps // 4
    print(
        f"config.optimizer.warmup_steps={warmup} leaves nothing of config.train.steps={steps}; the "
        f"warm-up is shortened to {counted(shorter, 'step')}"
    )
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=shorter)
    return dataclasses.replace(experiment, optimizer=optimizer)


def read_documents(data: Data) -> list[Document]:
    """Reads the corpus; a single document is cut, for some of it to be held out, and it is said."""
    separator = "\n" if data.chat else data.separator
    documents = read_corpus(data.path, separator, data.document_length)
    if len(documents) > 1 or data.document_length is not None or data.chat:
        return documents
    [document] = documents
    pieces = cut(document, default_length(document))
    if len(pieces) > 1:
        print(
            f"the corpus is one document, which is cut into {len(pieces)}, so that some can be "
            "held out; config.data.separator or config.data.document_length cut it otherwise"
        )
    return pieces


def make_tokenizer(data: Data, training: Sequence[Document]) -> Tokenizer:
    """Bytes, or BPE trained on the training documents and kept in the user's cache folder."""
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    texts = [document.text for document in training]
    return cached_bpe(texts, data.vocab_size, cache_folder())


def restore(
    workdir: Path, abstract: TrainState, shardings: TrainState, experiment: Experiment
) -> tuple[int, TrainState | None, dict]:
    """Reads the newest good checkpoint: its step, the state, and what else was remembered.

    Without a checkpoint they are 0, None and nothing.
    """
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    checkpoints = Checkpoints(workdir, read_only=True)
    if not checkpoints.steps:
        return 0, None, {}
    newest_first = reversed(checkpoints.steps)
    try:
        restored = checkpoints.restore(lambda _: checkpoint_items(target), newest_first)
    except LayoutError as error:
        raise CheckpointError(explain_layout(error, experiment)) from error
    step = jax.device_put(np.int32(restored.step), shardings.step)
    names = {item: name for name, item in _item_names(abstract).items()}
    trained = {names[item]: tree for item, tree in restored.items.items()}
    return restored.step, TrainState(step, **trained), restored.metadata


def require_same_base(remembered: dict, base: Params, path: str) -> None:
    """Refuses adapters that were trained on other parameters than those that they now change.

    Args:
      remembered: what the run's checkpoint remembers, which is the checksum of its base.
      base: the parameters of the model at `path`.

    Raises:
      ValueError: they are not the same.
    """
    found = checksum(base)
    if remembered.get("base", found) != found:
        raise ValueError(
            f"config.init.path={path!r} holds other parameters than those that the adapters of "
            "this run were trained on; give that model, or begin anew in another --workdir."
        )


def checkpoint_items(state: TrainState) -> dict:
    """What a checkpoint holds of a state, whose step is the checkpoint's own.

    Where adapters are trained, it also holds the whole model, with them added, for `load`.
    """
    items = {item: getattr(state, name) for name, item in _item_names(state).items()}
    if state.base is not None:
        averaged = {} if state.ema is None else {"ema": merged(state.base, state.ema)}
        items |= {"params": merged(state.base, state.params)} | averaged
    return items


def _item_names(state):
    """From the fields of a state that are there to the items of a checkpoint."""
    names = {"params": "params", "optimizer_state": "optimizer_state", "ema": "ema"}
    if isinstance(state.params, Adapters):
        names |= {"params": "adapters", "ema": "adapters_ema"}
    return {name: item for name, item in names.items() if getattr(state, name) is not None}
