"""Trees of arrays in the folders where Orbax keeps them: named, described, and read back.

Orbax can read them too. But where one array is damaged, it closes the event loop on which it reads
the others, and each of those fills the terminal with a traceback. Here TensorStore, on which Orbax
rests, reads without an event loop.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

_ODD = np.uint32(2654435761)  # of Knuth's multiplicative hash


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
    """A number below 2**32 made of all numbers of a tree of arrays, however they lie on devices.

    It is the sum of the arrays' words, each times an odd number that depends on its place, modulo
    2**32: another word in one place changes it. With several processes each adds up what it holds,
    and all of them must call this.
    """
    total = np.uint32(0)
    with np.errstate(over="ignore"):
        for leaf in jax.tree.leaves(tree):
            total = total * np.uint32(31) + np.sum(
                [_sum(*part) for part in _parts(leaf)], dtype=np.uint32
            )
    return int(_everywhere(total).sum(dtype=np.uint32))


def _parts(leaf):
    """What this process holds of an array, each part once: numbers, where they begin, strides."""
    strides = np.cumprod([1, *leaf.shape[:0:-1]], dtype=np.uint64)[::-1].astype(np.uint32)
    if not isinstance(leaf, jax.Array):
        return [(np.asarray(leaf), (0,) * np.ndim(leaf), strides)]
    return [
        (np.asarray(shard.data), [axis.start or 0 for axis in shard.index], strides)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _sum(x, begins, strides):
    """The sum of the words of a part, by their places in the whole array."""
    words = np.ascontiguousarray(x).view(f"uint{8 * min(x.itemsize, 4)}").astype(np.uint32)
    if x.itemsize == 8:
        words = words.reshape(*x.shape, 2) @ np.array([1, _ODD], np.uint32)
    places = np.uint32(0)
    for axis, begin in enumerate(begins):
        place = np.arange(begin, begin + x.shape[axis], dtype=np.uint32) * strides[axis]
        places = places + place.reshape([-1 if n == axis else 1 for n in range(x.ndim)])
    return (words * (places * _ODD | np.uint32(1))).sum(dtype=np.uint32)


def _everywhere(x):
    """A number of every process."""
    return multihost_utils.process_allgather(x) if jax.process_count() > 1 else np.asarray(x)


def read(folder: Path, target, expected_checksum: int):
    """Reads the arrays that Orbax wrote into a folder when it was given `flat(tree)`.

    Args:
      folder: where they are.
      target: the tree, of `jax.ShapeDtypeStruct`, with shardings where the arrays have any.
      expected_checksum: the checksum of the tree.

    Raises:
      Damaged: an array is missing or cannot be read, or is not what was written.
    """
    try:
        values, problem = _read(folder, target), None
    except Damaged as error:
        values, problem = None, error
    if _everywhere(np.array(problem is not None)).any():  # all processes go on to the next one
        raise problem or Damaged("another process cannot read its part")
    if checksum(values) != expected_checksum:
        raise Damaged("the numbers are not those that were saved")
    return values


def _read(folder, target):
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
    values = [_place(parts, name, leaves[name]) for name, parts in reads.items()]
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _begin_to_read(future, name, leaf):
    """The parts of an array that this process needs: (index, its devices, a future), each once."""
    store = _result(future, name)
    if store.shape != tuple(leaf.shape) or store.dtype.numpy_dtype != leaf.dtype:
        raise Damaged(f"the array {name} has another shape or type than was saved")
    devices = {}
    for device, index in _sharding(leaf).addressable_devices_indices_map(store.shape).items():
        bounds = tuple(
            axis.indices(size)[:2] for axis, size in zip(index, store.shape, strict=True)
        )
        devices.setdefault(bounds, []).append(device)
    slices = lambda bounds: tuple(slice(*axis) for axis in bounds)
    return [(devices, store[slices(bounds)].read()) for bounds, devices in devices.items()]


def _place(parts, name, leaf):
    if leaf.sharding is None:
        [(_, future)] = parts
        return jax.device_put(_result(future, name))
    arrays = [
        jax.device_put(value, device)
        for devices, future in parts
        for value in (_result(future, name),)
        for device in devices
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _sharding(leaf):
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _result(future, name):
    try:
        return future.result()
    except Exception as error:  # TensorStore reports damage with exceptions of several types
        raise Damaged(f"the array {name} cannot be read") from error
