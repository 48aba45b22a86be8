"""Directories as transformers writes them: config.json, safetensors, tokenizer.json."""

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from transformer.config import Config
from transformer.files import write_json
from transformer.program.params import Params, unscanned
from transformer.storage.formats import mxfp4, safetensors
from transformer.storage.formats.architectures import FAMILIES
from transformer.storage.formats.family import Family
from transformer.storage.formats.parameters import read_params, written
from transformer.storage.formats.tables import Unnamed, entries
from transformer.storage.keeping import Keeping
from transformer.storage.meaning import differences, function

CONFIG_FILE = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9
_LARGEST_JSON = 100_000_000
_FAR = 100  # fields, in which an architecture differs that cannot say what is wanted at all

_log = logging.getLogger(__name__)


class Published(NamedTuple):
    """What is read of a published directory besides its tokenizer."""

    config: Config
    params: Params
    values: dict[str, Any]


def is_published(directory: Path) -> bool:
    """Whether a directory holds a published model and not one of this project."""
    path = directory / CONFIG_FILE
    return path.is_file() and "model_type" in read_json(path)


def read_json(path: Path) -> dict:
    """Reads an object from a file of JSON.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold an object.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} is larger than {_LARGEST_JSON} bytes, and is not read.")
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; it must hold an object.")
    return value


def read_family(values: dict, where: str) -> Family:
    """The architecture of a published config.

    Raises:
      ValueError: it is not one of those that are known.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type={model_type!r} is not an architecture that can be loaded; those "
            f"that can are {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    return family.variant(values) or family


def read_directory(
    directory: Path,
    dtype: str | None = None,
    keeping: Keeping = Keeping(),  # noqa: B008, it is immutable
) -> Published:
    """Reads a published model.

    Args:
      directory: holds config.json and safetensors.
      dtype: "float32" or "bfloat16", the type of matrices and of activations; None: as in the file,
        where float16 becomes float32.
      keeping: how the parameters are kept.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the architecture or an option of it is not supported, or a file is damaged.
    """
    path = directory / CONFIG_FILE
    values = read_json(path)
    family = read_family(values, str(path))
    config = family.read(values, str(path))
    tensors = mxfp4.unpacked(read_tensors(directory))
    dtype = dtype or _stored_dtype(tensors)
    config = config.replace(dtype=dtype, cache_dtype=keeping.cache)
    try:
        params = read_params(family, config, tensors, np.dtype(dtype), keeping)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    return Published(config, params, values)


def _stored_dtype(tensors):
    """The type of most numbers, in which the program can compute."""
    sizes = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + int(np.prod(tensor.shape, dtype=object))
    most = max(sizes, key=sizes.get, default=np.dtype(np.float32))
    return "bfloat16" if most == ml_dtypes.bfloat16 else "float32"


def read_tensors(directory: Path) -> dict[str, safetensors.Stored]:
    """The tensors of a directory, in one file or, by its index, in several.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a file is damaged, or the index names a file elsewhere, or another tensor.
    """
    if (directory / INDEX_FILE).is_file():
        return _read_shards(directory, read_json(directory / INDEX_FILE))
    if (directory / WEIGHTS_FILE).is_file():
        return safetensors.read_header(directory / WEIGHTS_FILE)
    pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
    if pickles:
        raise ValueError(
            f"{directory} holds {pickles[0].name}, which is a pickle: PyTorch's format, which can "
            "run code when it is read. It is not loaded; save the model as safetensors."
        )
    raise FileNotFoundError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.")


def _read_shards(directory, index):
    where = directory / INDEX_FILE
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise ValueError(f"{where} has no weight_map from tensors to files.")
    tensors = {}
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{where} names the file {name!r}; it must be a plain name that ends in "
                ".safetensors."
            )
        tensors |= safetensors.read_header(directory / name)
    wrong = [x for x in names if x not in tensors or tensors[x].path.name != names[x]]
    wrong += [x for x in tensors if x not in names]
    if wrong:
        raise ValueError(f"{where} does not say where tensor {wrong[0]} is, or says it wrongly.")
    return tensors


def family_of(config: Config) -> tuple[Family, dict]:
    """The published architecture that a config is, and the config in its form.

    Raises:
      ValueError: it is none of them; says in what the nearest differs.
    """
    here, misses = function(config), []
    for family in FAMILIES.values():
        try:
            values = json.loads(json.dumps(family.write(config)))
            wrong = differences(function(family.read(values, family.model_type)), here)
            if not wrong:
                list(entries(family.table(config), config))
                return family, values
        except Unnamed as error:
            wrong = [f"it has no place for {error}"] * _FAR
        except (ValueError, TypeError) as error:
            wrong = [str(error)] * _FAR
        misses.append((family, wrong))
    nearest, wrong = min(misses, key=lambda miss: len(miss[1]))
    raise ValueError(
        f"no architecture of transformers computes what this config does; the nearest is "
        f"{nearest.architecture}, where {'; '.join(dict.fromkeys(wrong))}. Save it with "
        "format='unison'."
    )


def write_directory(directory: Path, config: Config, params: Params, extra: dict) -> None:
    """Writes a model as transformers does, but for its tokenizer.

    Args:
      directory: an empty one.
      config: the architecture.
      params: its parameters; layers that are scanned are taken apart.
      extra: more keys for config.json.

    Raises:
      ValueError: transformers has no such architecture.
    """
    config, params = unscanned(config, params)
    family, values = family_of(config)
    dtype = np.dtype(params.embedding.dtype)
    shapes = {name: (x.shape, dtype) for name, x in written(family, config, params, dtype)}
    shards = _shards(shapes)
    tensors = written(family, config, params, dtype)
    for name, part in shards.items():
        safetensors.write(directory / name, part, (next(tensors)[1] for _ in part))
    if len(shards) > 1:
        total = sum(_bytes(x) for x in shapes.values())
        weight_map = {tensor: name for name, part in shards.items() for tensor in part}
        write_json(
            directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    # The defaults of transformers, for padding above all, may not be in the vocabulary.
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    values |= extra | {"torch_dtype": dtype.name, "dtype": dtype.name}
    write_json(directory / CONFIG_FILE, values)


def _shards(shapes):
    """The tensors of each file, by the file's name."""
    parts, size = [{}], 0
    for name, (shape, dtype) in shapes.items():
        size += _bytes((shape, dtype))
        if size > _SHARD_BYTES and parts[-1]:
            parts.append({})
            size = _bytes((shape, dtype))
        parts[-1][name] = (shape, dtype)
    if len(parts) == 1:
        return {WEIGHTS_FILE: parts[0]}
    return {
        f"model-{n + 1:05}-of-{len(parts):05}.safetensors": part for n, part in enumerate(parts)
    }


def _bytes(described):
    shape, dtype = described
    return int(np.prod(shape, dtype=object)) * dtype.itemsize
