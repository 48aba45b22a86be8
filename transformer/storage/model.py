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
from transformer.storage.checkpoint import FOLDER, CheckpointError, Checkpoints

CONFIG_FILE = "config.json"

# Fields of `Config` that change how a function is computed, and neither it nor its parameters.
_COMPUTATION = {"remat", "dtype"}


@dataclass(frozen=True)
class Model:
    """What it takes to use a model: the architecture, the parameters and the tokenizer."""

    config: Config
    params: Params
    tokenizer: Tokenizer


def save(model: Model, path: str | os.PathLike) -> None:
    """Saves a model as a new directory, which `load` reads.

    Raises:
      FileExistsError: something is there already.
      transformer.storage.checkpoint.CheckpointError: the disk is full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; remove it, or save to another path.")
    made = not path.exists()
    try:
        with Checkpoints(path) as checkpoints:
            checkpoints.save(0, {"params": model.params}, {})
    except CheckpointError:  # nothing is left in the way of the next try
        shutil.rmtree(path if made else path / FOLDER, ignore_errors=True)
        raise
    write_description(path, model.config, model.tokenizer)


def load(path: str | os.PathLike) -> Model:
    """Reads a model that `save` wrote, or that of a training run from its work directory.

    Of a run's checkpoints it is the one with the lowest validation loss, or the newest where none
    has been validated; where that one is damaged, the next best, and a warning says so. Where the
    run keeps a moving average of the parameters, that is what is read.

    Raises:
      FileNotFoundError: the directory is neither of the two.
      ValueError: its description does not describe a model.
      transformer.storage.checkpoint.CheckpointError: no checkpoint in it can be read.
    """
    config = read_config(path)
    tokenizer = Tokenizer.load(path)
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), params)
    averaged_first = lambda names: {"ema" if "ema" in names else "params": target}
    with Checkpoints(path, read_only=True) as checkpoints:
        items = checkpoints.restore(averaged_first, checkpoints.best_first).items
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
    there, here = read_config(directory).to_dict(), config.to_dict()
    differing = [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if name not in _COMPUTATION and there[name] != here[name]
    ]
    if differing:
        raise ValueError(
            f"{directory} holds a model of another architecture: {'; '.join(differing)}. "
            "Use another work directory, or the config that this one was begun with."
        )
