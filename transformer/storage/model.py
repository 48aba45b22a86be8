"""A model: its config, its parameters and its tokenizer, in memory and on disk."""

import json
import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import Config
from transformer.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from transformer.data.tokenizer import Tokenizer
from transformer.files import write_json
from transformer.inference.prepare import cast_params, pack_params
from transformer.numerics.matrix import dense, is_matrix
from transformer.numerics.quantised import is_quantised
from transformer.program.fit import abstract_params
from transformer.program.params import Params
from transformer.storage.arrays import flat
from transformer.storage.checkpoint import CheckpointError, Checkpoints, LayoutError
from transformer.storage.formats import gguf, hub, huggingface, tokenizer_files
from transformer.storage.keeping import Keeping, Prepare, Sharding
from transformer.storage.meaning import differences, meaning

CONFIG_FILE = "config.json"
FORMATS = ("unison", "huggingface")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Model:
    """What it takes to use a model.

    Attributes:
      config: the architecture.
      params: the parameters.
      tokenizer: from text to tokens, and back; None: the model takes and gives token ids only.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer | None


def save(model: Model, path: str | os.PathLike, *, format: str = "unison") -> None:
    """Saves a model as a new directory, which `load` reads.

    Args:
      model: the model.
      path: a directory that is empty, or not there.
      format: "unison", or "huggingface": config.json, safetensors and tokenizer.json, as
        transformers reads them too.

    Raises:
      FileExistsError: something is there already.
      ValueError: there is no such format, parameters are kept in int8, or transformers has no such
        architecture; says what it lacks.
      OSError, transformer.storage.checkpoint.CheckpointError: it cannot be written; the directory
        is as it was before.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} does not exist; choose one of {', '.join(FORMATS)}.")
    if any(map(is_quantised, jax.tree.leaves(model.params, is_leaf=is_quantised))):
        raise ValueError("parameters in int8 are not saved; save the model loaded without weights.")
    model = replace(model, params=jax.tree.map(dense, model.params, is_leaf=is_matrix))
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; remove it, or save to another path.")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write = _write_published if format == "huggingface" else _write_own
    try:
        unfinished.mkdir(parents=True)
        write(model, unfinished)
        os.replace(unfinished, path)  # over an empty directory too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_own(model, path):
    with Checkpoints(path) as checkpoints:
        checkpoints.save(0, {"params": model.params}, {})
    write_description(path, model.config, model.tokenizer)


def _write_published(model, path):
    extra = {}
    if model.tokenizer is not None:
        extra = tokenizer_files.write(path, model.tokenizer, model.config.max_length)
    huggingface.write_directory(path, model.config, model.params, extra)


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    weights: str | None = None,
    cache: str | None = None,
    sharding: Sharding | None = None,
    prepare: Prepare | None = None,
) -> Model:
    """Reads a model: a published one, one that `save` wrote, or that of a training run.

    Args:
      path: a directory with a config.json and safetensors, as transformers writes them; or a file
        of GGUF, as llama.cpp reads them; or "hf://owner/name", one of the Hugging Face Hub, which
        is downloaded once and kept in its cache; or a directory that `save` wrote; or the work
        directory of a training run.
      dtype: "float32" or "bfloat16", the type of matrices and of activations; None: as saved, where
        float16 becomes float32.
      weights: "int8" keeps matrices as int8 numbers with a scale for every 64 of them, for
        generating and scoring: a quarter of the size of float32. Experts, norms and biases are left
        as they are. "panels" lays matrices out as a CPU multiplies few rows by them fastest, for
        generating and scoring: what `generate` does otherwise at each call, in memory of its own.
        Elsewhere than on a CPU that is no other way than before. None: as `dtype` says.
      cache: "int8" keeps keys and values as int8 numbers with a scale for each head of a cell, for
        generating and scoring: about a quarter of the size of float32, and rounded. None: in the
        type of the activations.
      sharding: sharding(name) is where the parameter of a name, as "layers.0.mixer.query.weight",
        is placed; None: on the first device.
      prepare: prepare(config, params) is called in a thread of its own while the parameters of a
        published model are read, unless `weights` is "int8"; params are their shapes.

    Of the checkpoints of a run it reads the one with the lowest validation loss, or the newest
    where none has been validated. Where that one is damaged, a warning says so, and it reads the
    next best. Where the run keeps a moving average of the parameters, it reads that.

    A published directory without a tokenizer.json gives a model with `tokenizer=None`.

    Raises:
      FileNotFoundError: there is no model.
      ConnectionError: the Hub cannot be reached, and the model is not in its cache.
      ValueError: its description does not describe a model; or the architecture of a published
        model, or an option of it, is not supported; or its files are damaged.
      transformer.storage.checkpoint.CheckpointError: no checkpoint in it can be read, or another
        version wrote it, which laid the parameters out otherwise.
    """
    dtype = None if dtype is None else jnp.dtype(dtype).name
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}; choose one of {', '.join(DTYPES)}, or None.")
    keeping = Keeping(sharding, weights, cache, prepare)
    if hub.is_address(path):
        path = hub.download(os.fspath(path))
    path = Path(path)
    if gguf.is_file(path):
        return Model(*gguf.read(path, dtype, keeping))
    if huggingface.is_published(path):
        config, params, values = huggingface.read_directory(path, dtype, keeping)
        return Model(config, params, tokenizer_files.read(path, values))
    model = _load_own(path, sharding)
    model = replace(model, config=model.config.replace(cache_dtype=cache))
    if dtype is not None:
        model = _cast(model, dtype)
    if weights is None:
        return model
    if weights == "panels":
        return replace(model, params=pack_params(cast_params(model.config, model.params)))
    forms, leaves = keeping.forms(model.params, model.params), flat(model.params)
    kept = [keeping.place(name, forms[name](np.asarray(x))) for name, x in leaves.items()]
    return replace(model, params=jax.tree.unflatten(jax.tree.structure(model.params), kept))


def _cast(model, dtype):
    """Matrices in another type, as they come from a published directory."""
    cast = lambda x: x.astype(dtype) if x.ndim > 1 else x
    config = model.config.replace(dtype=dtype)
    return Model(config, jax.tree.map(cast, model.params), model.tokenizer)


def _load_own(path, sharding):
    config = read_config(path)
    tokenizer = Tokenizer.load(path) if (path / TOKENIZER_FILE).exists() else None
    checkpoints = Checkpoints(path, read_only=True)
    for dtype in DTYPES:  # as a run keeps matrices, and as `load` may have given them to `save`
        target = _target(config, dtype, sharding or (lambda _: None))
        averaged_first = lambda names, target=target: {
            "ema" if "ema" in names else "params": target
        }
        try:
            items = checkpoints.restore(averaged_first, checkpoints.best_first).items
        except LayoutError as error:
            differs = error
        else:
            return Model(config, *items.values(), tokenizer)
    raise CheckpointError(
        f"the parameters in {path} are not laid out as its {CONFIG_FILE} says: another version of "
        "Unison wrote them, or the file was changed. Load them with that version, or make them "
        "anew."
    ) from differs


def _target(config, dtype, placed):
    """What is read of parameters whose matrices are kept in a type."""
    params = abstract_params(config)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype, sharding=placed(name))
        for name, x in flat(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), shapes)


def write_description(
    directory: str | os.PathLike, config: Config, tokenizer: Tokenizer | None
) -> None:
    """Writes what describes a model besides its parameters, each file in one atomic step."""
    if tokenizer is not None:
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
    differing = differences(meaning(read_config(directory)), meaning(config))
    if differing:
        raise ValueError(
            f"{directory} holds a model of another architecture: {'; '.join(differing)}. "
            "Use another work directory, or the config that this one was begun with."
        )
