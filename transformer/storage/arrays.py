"""Trees of arrays in the folders where Orbax keeps them: named, described, and read back.

Orbax can read them too. But where one array is damaged, it closes the event loop on which it reads
the others, and each of those fills the terminal with a traceback. Here TensorStore, on which Orbax
rests, reads without an event loop.
"""

import hashlib
import zlib
from pathlib import Path

import jax
import numpy as np
import tensorstore


class Damaged(Exception):
    """What is in a folder is not what was written there."""


def flat(tree) -> dict:
    """The leaves of a tree by their paths, as `layers.0.attention.query.weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def layout(tree) -> str:
    """A digest of the paths, shapes and types of a tree of arrays."""
    text = [(name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in flat(tree).items()]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def checksum(tree) -> int:
    """The CRC-32 of the numbers of a tree of arrays."""
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), checksum)
    return checksum


def read(folder: Path, target, expected_checksum: int):
    """Reads the arrays that Orbax wrote into a folder when it was given `flat(tree)`.

    Args:
      folder: where they are.
      target: the tree, of `jax.ShapeDtypeStruct`, with shardings where the arrays have any.
      expected_checksum: the checksum of the tree.

    Raises:
      Damaged: an array is missing or cannot be read, or is not what was written.
    """
    leaves = flat(target)
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    # TensorStore works in the background: everything is begun before anything is waited for.
    stores = {
        name: tensorstore.open(
            {"driver": "auto", "kvstore": database | {"path": f"{name}/"}}, open=True, read=True
        )
        for name in leaves
    }
    reads = {name: _begin_to_read(store, name, leaves[name]) for name, store in stores.items()}
    values = [_result(values, name) for name, values in reads.items()]
    if checksum(values) != expected_checksum:
        raise Damaged("the numbers are not those that were saved")
    place = lambda leaf, value: jax.device_put(value, leaf.sharding)
    return jax.tree.map(place, target, jax.tree.unflatten(jax.tree.structure(target), values))


def _begin_to_read(future, name, leaf):
    store = _result(future, name)
    if store.shape != tuple(leaf.shape) or store.dtype.numpy_dtype != leaf.dtype:
        raise Damaged(f"the array {name} has another shape or type than was saved")
    return store.read()


def _result(future, name):
    try:
        return future.result()
    except Exception as error:  # TensorStore reports damage with exceptions of several types
        raise Damaged(f"the array {name} cannot be read") from error
