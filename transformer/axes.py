"""Logical axes of arrays, and the axes of a mesh of devices that each of them is split over.

This is the one table that says how arrays lie on several devices. Where parameters, the optimizer's
state and batches lie follows from it (`transformer.devices.layout`), and so does what the compiler
is told of activations (`constrain`).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# From the slowest links between devices to the fastest.
#   data: other rows, and the same parameters.
#   fsdp: other rows, and a part of every parameter, which is gathered where it is used (ZeRO-3,
#     arXiv:1910.02054).
#   context: other positions of the same rows.
#   tensor: other heads, and a part of every matrix (arXiv:1909.08053).
MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES = {
    "rows": ("data", "fsdp"),
    "tokens": "context",
    "sequences": "data",  # those that are generated
    "width": "fsdp",
    "heads": "tensor",
    "feed_forward": "tensor",
    "vocabulary": "tensor",
    "experts": "tensor",
}


def partition(*axes: str | None) -> PartitionSpec:
    """The mesh axes that an array's logical axes are split over; None stays whole."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler how an array lies on the mesh of `jax.set_mesh`; without a mesh, nothing.

    An axis that `jax.vmap` maps lies as its `spmd_axis_name` says, and as the compiler chooses
    where there is none.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(*axes))


def split_over(size: int, *axes: str) -> tuple[str, ...]:
    """The axes of `jax.set_mesh`'s mesh that `size` elements along logical axes are split over.

    None of them where they do not divide it: a prompt, for instance, may have any length. Within
    `shard_map` arrays are split over its axes already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    names = tuple(n for axis in axes for n in _names(RULES[axis]) if free.get(n, 1) > 1)
    return names if size % math.prod(free[n] for n in names) == 0 else ()


def over_parts(function: Callable, num_shared: int, **sizes: int) -> Callable:
    """Has each device of the mesh run a function for its own part of some axes.

    What it sums up within a loop is then added up over devices once, behind the loop; and a loop
    over sequences, of which each touches its own cache, moves no cache.

    Args:
      function: takes `num_shared` trees of what all parts share, then others whose arrays have
        these leading axes, as those that it returns. No part depends on another.
      sizes: of each leading axis, by its logical name.
    """
    return _split(function, num_shared, [split_over(size, axis) for axis, size in sizes.items()])


def split_queries(read: Callable, size: int) -> Callable:
    """Has each device of the mesh read for the queries of its own tokens.

    Left to itself, XLA runs a loop over tiles of queries on every device, and gathers for each.

    Args:
      read: as `kernels.write_read.chunk` splits it: three trees that all queries share, then those
        whose arrays have leading axes of sequences and of `size` tokens, as what it returns.
    """
    names = split_over(size, "tokens")
    if not names:
        return read

    def split(keys, values, shared, *own):
        common = keys, values, shared
        # Wide on the way in, so that their gradients are summed over devices in float32.
        wide = jax.tree.map(_wide, common)
        narrow = lambda wide: jax.tree.map(lambda x, like: x.astype(like.dtype), wide, common)
        return _split(lambda wide, *own: read(*narrow(wide), *own), 1, [(), names])(wide, *own)

    return split


def split_heads(rows: Callable, num_tokens: int, num_heads: int) -> Callable:
    """Has each device of the mesh run `rows` of a memory for its own heads, which do not meet.

    Tokens are exchanged for heads, and back (DeepSpeed-Ulysses, arXiv:2309.14509). Left to itself,
    XLA moves what the gradient computes again, in each turn of its loop.

    Args:
      rows: takes a block [B, N, ...], positions [B, T], and cells and queries [B, T, N, ...]; it
        returns a block and what is read [B, T, N, ...].
    """
    tokens = split_over(num_tokens, "tokens")
    if not tokens:
        return rows
    heads = split_over(num_heads, "heads", "tokens") or split_over(num_heads, "heads")
    of_block, own = PartitionSpec(None, heads or None), PartitionSpec(None, None, heads or None)
    any_way = PartitionSpec.UNCONSTRAINED
    by_token = lambda x: PartitionSpec(any_way, tokens, *[any_way] * (x.ndim - 2))
    stay = lambda x: jax.lax.with_sharding_constraint(x, by_token(x))
    split = jax.shard_map(
        rows,
        in_specs=(of_block, PartitionSpec(), own, own),
        out_specs=(of_block, own),
        axis_names={*heads, *tokens},
        check_vma=False,
    )

    def exchanged(block, i, cells, queries):
        block, z = split(block, i, *jax.tree.map(stay, (cells, queries)))
        return block, jax.tree.map(stay, z)

    return exchanged


def over_sequences(function: Callable, size: int, num_shared: int) -> Callable:
    """`over_parts` for `size` sequences that are generated.

    On a mesh that splits more than sequences and matrices every device runs all of them: with
    "fsdp" beside, XLA (jax 0.10.2) fails in a gather.
    """
    if split_over(0, "width", "tokens"):
        return function
    return over_parts(function, num_shared, sequences=size)


def gather_tokens(x: jax.Array) -> jax.Array:
    """Has devices that hold different tokens of x [B, T, ...] hold all of them."""
    if not split_over(x.shape[1], "tokens"):
        return x
    any_way = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(any_way, None, *[any_way] * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, spec)


def _split(function, num_shared, names):
    """The function on its own part of the leading axes, each split over some axes of the mesh."""
    if not any(names):
        return function
    own, shared = PartitionSpec(*(axis or None for axis in names)), PartitionSpec()

    def split(*operands):
        return jax.shard_map(
            function,
            in_specs=tuple(shared if n < num_shared else own for n in range(len(operands))),
            out_specs=own,
            axis_names={name for axis in names for name in axis},
            check_vma=False,  # loops of any program would have to say what varies
        )(*operands)

    return split


def _wide(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x


def _names(axis):
    return (axis,) if isinstance(axis, str) else axis
