"""A model: its config, its parameters and its tokenizer, in memory and on disk."""

import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from transformer.config import Config
from transformer.data.tokenizer import Tokenizer
from transformer.files import write_json
from transformer.program.init import init_params
from transformer.program.params import Params
from transformer.storage.checkpoint import CheckpointError, Checkpoints, LayoutError

CONFIG_FILE = "config.json"

# Fields of `Config` that change how the function is computed, but neither what it is nor its
# parameters.
_COMPUTATION = {"remat", "dtype"}


@dataclass(frozen=True)
class Model:
    """What it takes to use a model.

    Attributes:
      config: the architecture.
      params: the parameters.
      tokenizer: from text to tokens, and back.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer


def save(model: Model, path: str | os.PathLike) -> None:
    """Saves a model as a new directory, which `load` reads.

    Raises:
      FileExistsError: something is there already.
      OSError, transformer.storage.checkpoint.CheckpointError: it cannot be written; the directory
        is as it was before.
    """
    path = Path(path)
    made = not path.exists()
    if not made and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; remove it, or save to another path.")
    try:
        with Checkpoints(path) as checkpoints:
            checkpoints.save(0, {"params": model.params}, {})
        write_description(path, model.config, model.tokenizer)
    except (OSError, CheckpointError):  # nothing is left in the way of the next try
        shutil.rmtree(path, ignore_errors=True)
        if not made:
            path.mkdir()
        raise


def load(path: str | os.PathLike) -> Model:
    """Reads a model that `save` wrote, or that of a training run from its work directory.

    Of the checkpoints of a run it reads the one with the lowest validation loss, or the newest
    where none has been validated. Where that one is damaged, a warning says so, and it reads the
    next best. Where the run keeps a moving average of the parameters, it reads that.

    Raises:
      FileNotFoundError: the directory is neither of the two.
      ValueError: its description does not describe a model.
      transformer.storage.checkpoint.CheckpointError: no checkpoint in it can be read, or another
        version wrote it, which laid the parameters out otherwise.
    """
    config = read_config(path)
    tokenizer = Tokenizer.load(path)
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), params)
    averaged_first = lambda names: {"ema" if "ema" in names else "params": target}
    checkpoints = Checkpoints(path, read_only=True)
    try:
        items = checkpoints.restore(averaged_first, checkpoints.best_first).items
    except LayoutError as error:
        raise CheckpointError(
            f"the parameters in {path} are not laid out as its {CONFIG_FILE} says: another version "
            "of Unison wrote them, or the file was changed. Load them with that version, or make "
            "them anew."
        ) from error
    return Model(config, *items.values(), tokenizer)


def write_description(directory: str | os.PathLike, config: Config, tokenizer: Tokenizer) -> None:
    """Writes what describes a model besides its parameters, each file in one atomic step."""
    tokenizer.save(directory)
    write_json(Path(directory) / CONFIG_FILE, config.to_dict())


def read_config(directory: str | os.PathLike) -> Config:
    """Reads the architecture of the model in a directory.

    Raises:
      FileNotFoundError: the directory is neither a saved model nor a work directory.
      ValueError: its file does not describe a model.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is neither a saved model nor a work directory: it has no {CONFIG_FILE}."
        )
    try:
        return Config(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from error


def require_same_architecture(directory: str | os.PathLike, config: Config) -> None:
    """Refuses to go on with a directory whose parameters have other shapes or another meaning.

    Raises:
      ValueError: names the fields that differ.
    """
    there, here = (_meaning(each) for each in (read_config(directory), config))
    differing = [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if there[name] != here[name]
    ]
    if differing:
        raise ValueError(
            f"{directory} holds a model of another architecture: {'; '.join(differing)}. "
            "Use another work directory, or the config that this one was begun with."
        )


def _meaning(config):
    """The fields that say what a model is; a size that follows from others is that size."""
    sizes = {
        "num_kv_heads": config.shape.K,
        "head_size": config.shape.H,
        "feed_forward_width": config.shape.F,
    }
    fields = config.to_dict() | sizes
    return {name: value for name, value in fields.items() if name not in _COMPUTATION}
