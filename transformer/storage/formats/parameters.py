"""Parameters from published tensors and back, one tensor after the other."""

import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import jax
import ml_dtypes
import numpy as np

from transformer.config import Config
from transformer.program.fit import abstract_params
from transformer.program.params import Params
from transformer.storage.arrays import flat
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import SAME
from transformer.storage.formats.tables import (
    Entry,
    Table,
    are_experts_apart,
    entries,
)
from transformer.storage.keeping import Keeping

NUMBERS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
_THREADS = max(2, min(8, os.cpu_count() or 1))
_SHARE = 16  # one in so many numbers may be read at a time
_SHOWN = 3  # names in a message
_LARGEST_ZEROS = 2**27  # numbers that are made to see what shapes they would have


class Tensor(Protocol):
    """A published tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, dtype: np.dtype | None = None) -> np.ndarray:
        """Its numbers in a type, in memory of their own; None: the type it has."""


def read_params(
    family: Family,
    config: Config,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    keeping: Keeping,
) -> Params:
    """Reads parameters, tensor by tensor: few are in memory in both forms at a time.

    The largest come first, while there is little beside them, and of those that are as large the
    ones that are stored in another order, which are there twice for a moment. Small ones are read
    in several threads.

    Args:
      family: says which tensors hold which parameters.
      config: the architecture.
      tensors: by their published names.
      dtype: of matrices. Vectors, which are few numbers, are float32.
      keeping: how the parameters are kept.

    Raises:
      ValueError: tensors are missing, left over, of a wrong shape or of a wrong type; names them.
    """
    table = family.table(config)
    require_sizes(config, table, tensors)
    abstract = abstract_params(config)
    shapes, made = flat(abstract), {}
    published = {}
    find = _finder(family, tensors)
    table = list(entries(table, config))
    size = partial(_size, shapes)
    room = lambda entry: (size(entry), entry.layout is not SAME)
    for entry in table:
        published |= {find(name): name for name in entry.published}
    _require_names(family, config, tensors, published)
    typed = lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else np.float32)
    kept = keeping.shapes(jax.tree.map(typed, abstract))
    forms = keeping.forms(abstract, kept)
    with ThreadPoolExecutor(_THREADS) as pool:
        prepare = pool.submit(_prepare, keeping, config, kept)
        read = lambda entry: pool.submit(_read, entry, config, tensors, find, dtype, shapes, forms)
        for entry, arrays in _ahead(read, sorted(table, key=room, reverse=True), size):
            made |= {name: keeping.place(name, arrays.pop(0)) for name in entry.ours}
        prepare.result()
    return jax.tree.unflatten(jax.tree.structure(abstract), [made[name] for name in shapes])


def require_sizes(config: Config, table: Table, tensors: Mapping[str, Tensor]) -> None:
    """Refuses more layers or experts than there can be, before anything is done for each of them.

    Raises:
      ValueError: there are fewer tensors.
    """
    sizes = {"layers": config.num_layers}
    if are_experts_apart(table):
        sizes["experts"] = config.num_experts
    for name, size in sizes.items():
        if size > len(tensors):
            raise ValueError(f"the config has {size} {name}, and there are {len(tensors)} tensors.")


def _size(shapes, entry):
    return sum(math.prod(shapes[name].shape) for name in entry.ours)


def _ahead(read, table, size):
    """(entry, what is read) of each entry, in order, some of them being read at a time.

    Those that are have a small share of all numbers together, or else it is one.
    """
    most = sum(map(size, table)) / _SHARE
    reading = deque()
    next_one = lambda: (reading[0][0], reading.popleft()[1].result())
    for entry in table:
        while reading and sum(size(other) for other, _ in reading) + size(entry) > most:
            yield next_one()
        reading.append((entry, read(entry)))
    while reading:
        yield next_one()


def _prepare(keeping, config, shapes):
    if keeping.prepare is not None and keeping.weights != "int8":
        keeping.prepare(config, shapes)


def _finder(family, tensors):
    """From a name in the table to that in the file, which may lack the prefix."""
    bare = not any(name.startswith(family.prefix) for name in tensors)
    return lambda name: name.removeprefix(family.prefix) if bare else name


def _require_names(family, config, tensors, published):
    missing = [name for name in published if name not in tensors]
    if missing:
        raise ValueError(
            f"{len(missing)} tensors are missing that {family.architecture} has with this config: "
            f"{_some(missing)}."
        )
    surplus = [name for name in tensors if name not in published]
    ignored = [x.replace("{L}", str(config.num_layers)) for x in family.ignored]
    surplus = [x for x in surplus if not any(re.fullmatch(p, x) for p in ignored)]
    if surplus == ["lm_head.weight"] and config.tie_embeddings:
        surplus = _unless_tied(tensors, published)
    if surplus:
        raise ValueError(
            f"{len(surplus)} tensors are left over that {family.architecture} does not have with "
            f"this config: {_some(surplus)}. What they do is not known, so nothing is loaded."
        )


def _unless_tied(tensors, published):
    """The output's name, if it is not the embedding once more."""
    [embedding] = [
        name
        for name in published
        if published[name].endswith(("embed_tokens.weight", "wte.weight"))
    ]
    one, other = tensors[embedding], tensors["lm_head.weight"]
    same = one.shape == other.shape and one.dtype == other.dtype
    return [] if same and _equal(one.read(), other.read()) else ["lm_head.weight"]


def _equal(x, y, rows=1024):
    return all(
        x[n : n + rows].tobytes() == y[n : n + rows].tobytes() for n in range(0, len(x), rows)
    )


def _some(names):
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read(entry: Entry, config, tensors, find, dtype, shapes, forms):
    """The parameters of an entry as they are kept, their shapes checked."""
    arrays = [_numbers(find(name), tensors[find(name)], dtype) for name in entry.published]
    try:
        made = entry.layout.read(config, arrays)
    except (ValueError, IndexError):  # arrays that cannot be cut or joined as the layout says
        made = []
    shapes = [shapes[name].shape for name in entry.ours]
    if [x.shape for x in made] != shapes:
        wrong = "; ".join(_wrong(entry, config, arrays, shapes))
        raise ValueError(f"tensor {wrong}: the config is that of another model.")
    return [forms[name](x) for name, x in zip(entry.ours, made, strict=True)]


def _wrong(entry, config, arrays, shapes):
    """What is wrong with the shapes of an entry's tensors, in words."""
    if sum(map(math.prod, shapes)) > _LARGEST_ZEROS:
        parameters = " and ".join(map(str, map(list, shapes)))
        yield f"{_some(entry.published)} does not make parameters of the shape {parameters}"
        return
    wanted = entry.layout.write(config, [np.zeros(shape, np.float32) for shape in shapes])
    for name, x, y in zip(entry.published, arrays, wanted, strict=True):
        if x.shape != y.shape:
            yield f"{name} has the shape {list(x.shape)}, and {list(y.shape)} is wanted"


def _numbers(name, tensor, dtype):
    if tensor.dtype not in NUMBERS:
        raise ValueError(
            f"tensor {name} is of type {tensor.dtype}; parameters must be float32, bfloat16, "
            "float16 or float64."
        )
    return tensor.read(dtype if len(tensor.shape) > 1 else np.dtype(np.float32))


def written(
    family: Family, config: Config, params: Params, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """The published tensors of some parameters, with their names, one after the other."""
    leaves = flat(params)
    for entry in entries(family.table(config), config):
        arrays = [_host(leaves[name]) for name in entry.ours]
        for name, x in zip(entry.published, entry.layout.write(config, arrays), strict=True):
            yield name, x.astype(dtype)


def _host(x):
    """An array in memory; vectors in float32, so that nothing is lost before they are cast."""
    x = np.asarray(x)
    return x.astype(np.float32) if x.ndim == 1 else x
