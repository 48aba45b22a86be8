"""Kernels on several devices: split over them by plain jit, or called inside of `shard_map`.

To XLA a kernel is one opaque call: given sharded operands, it would gather them and run the whole
kernel on every device. But attention is independent for each sequence, and for each key head with
its query heads, and this module tells XLA so.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec


def split_by_rows_and_heads(
    function: Callable,
    operands: Sequence,
    axes: Sequence[str],
    result_axes: Sequence[str],
):
    """Calls `function(*operands)` so that jit may run it on a part of the rows and heads.

    Args:
      function: a function of arrays that returns a tuple of arrays. It must read all sizes from
        its operands.
      operands: arrays, or None. The first must have the axes b and n, the second the axis k.
      axes: for each operand a string with a letter for each axis: b for sequences, n for query
        heads, k for key heads, and any other letter for an axis that stays whole.
      result_axes: the same for each result.

    Returns:
      The results. With one device this is no more than the call.
    """
    if jax.device_count() == 1:
        return tuple(function(*operands))
    given = [n for n, x in enumerate(operands) if x is not None]
    present = [axes[n] for n in given]
    num_heads, num_kv_heads = (
        operands[n].shape[axes[n].index(letter)] for n, letter in ((0, "n"), (1, "k"))
    )

    def of_arrays(*arrays):
        every = [None] * len(operands)
        for n, x in zip(given, arrays, strict=True):
            every[n] = x
        return tuple(function(*every))

    def partition(mesh, shapes, results):
        rows, heads = _split(mesh, shapes, present, num_kv_heads)
        names = {"b": rows, "n": heads, "k": heads}
        shard = lambda letters: NamedSharding(mesh, PartitionSpec(*map(names.get, letters)))
        return mesh, of_arrays, tuple(map(shard, result_axes)), tuple(map(shard, present))

    split = custom_partitioning(of_arrays)
    split.def_partition(
        partition,
        decode_shardings=False,  # JAX refuses some; see `_names`
        sharding_rule=_rule(present, result_axes, num_heads // num_kv_heads),
    )
    return split(*(operands[n] for n in given))


def foldable(function: Callable, axes: Sequence[str], result_axes: Sequence[str]):
    """Returns `function`, split over devices as above and with a rule for `vmap`.

    An axis that is mapped joins b, which must be the leading axis of every operand and result.
    """

    @custom_vmap
    def folded(*operands):
        return split_by_rows_and_heads(function, operands, axes, result_axes)

    @folded.def_vmap
    def _(size, mapped, *operands):
        def fold(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = folded(*jax.tree.map(fold, operands, tuple(mapped)))
        unfolded = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, results)

    return folded


def vary_like(tree, like):
    """Marks arrays as varying over every mesh axis of `shard_map` that one of `like` varies over.

    Loops and kernels need it, whose operands and results must vary alike. The gradient of an array
    that was the same on every device is then summed over the devices by JAX itself.
    """
    axes = frozenset().union(*map(varying, jax.tree.leaves(like)))

    def mark(x):
        missing = tuple(axes - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def varying(x) -> frozenset[str]:
    """The mesh axes of `shard_map` that an array varies over, as far as `shard_map` checks it."""
    return jax.typeof(x).mat.varying


def _split(mesh, shapes, axes, num_kv_heads):
    """The mesh axes over which rows and heads are split: those of the first operand."""
    rows, heads = (_names(mesh, shapes[0], axes[0].index(letter)) for letter in "bn")
    return rows, None if num_kv_heads % math.prod(mesh.shape[name] for name in heads) else heads


def _names(mesh, x, axis):
    """The mesh axes that an axis of x is split over.

    None of them where that is uneven, or by a part of a mesh axis: four heads lie on a mesh axis of
    eight as four parts, each of them split in its last axis too.
    """
    try:
        indices = x.sharding.devices_indices_map(x.shape)
    except ValueError:
        return ()
    begins = np.vectorize(lambda device: indices[device][axis].start or 0)(mesh.devices)
    names = [
        name for n, name in enumerate(mesh.axis_names) if (begins != begins.take([0], axis=n)).any()
    ]
    is_whole = len(np.unique(begins)) == math.prod(mesh.shape[name] for name in names)
    return tuple(names) if is_whole else ()


def _rule(axes, result_axes, group):
    """Tells Shardy which axes of operands and results are the same axis."""
    whole = []

    def factor(letter):
        if letter == "b":
            return "b"
        if letter in "nk":
            return CompoundFactor("k", "g") if letter == "n" and group > 1 else "k"
        whole.append(f"w{len(whole)}")
        return whole[-1]

    mapping = lambda letters: ArrayMapping(*map(factor, letters))
    operands, results = tuple(map(mapping, axes)), tuple(map(mapping, result_axes))
    sizes = {"g": group} if group > 1 else {}
    return SdyShardingRule(operands, results, need_replication_factors=tuple(whole), **sizes)
