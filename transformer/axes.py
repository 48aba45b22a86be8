"""Logical axes of arrays, and the axes of a mesh of devices that each of them is split over.

This is the one table that says how arrays lie on several devices. Where parameters, the optimizer's
state and batches lie follows from it (`transformer.devices.layout`), and so does what the compiler
is told of activations (`constrain`).
"""

import math
from collections.abc import Callable

import jax
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
    names = [split_over(size, axis) for axis, size in sizes.items()]
    if not any(names):
        return function
    own, shared = PartitionSpec(*names), PartitionSpec()

    def split(*operands):
        return jax.shard_map(
            function,
            in_specs=tuple(shared if n < num_shared else own for n in range(len(operands))),
            out_specs=own,
            axis_names={name for axis in names for name in axis},
            check_vma=False,  # loops of any program would have to say what varies
        )(*operands)

    return split


def over_sequences(function: Callable, size: int, num_shared: int) -> Callable:
    """`over_parts` for `size` sequences that are generated.

    On a mesh that splits more than sequences and matrices every device runs all of them: with
    "fsdp" beside, XLA (jax 0.10.2) fails in a gather.
    """
    if split_over(0, "width", "tokens"):
        return function
    return over_parts(function, num_shared, sequences=size)


def gather_tokens(x: jax.Array, heads: bool = False) -> jax.Array:
    """Has devices that hold different tokens of x [B, T, ...] hold all of them.

    With `heads`, for x [B, T, N, ...], each holds some heads instead, where their number divides:
    tokens are exchanged for heads (DeepSpeed-Ulysses, arXiv:2309.14509).
    """
    if not split_over(x.shape[1], "tokens"):
        return x
    any_way = PartitionSpec.UNCONSTRAINED
    spec = [any_way, None, *[any_way] * (x.ndim - 2)]
    if heads:
        spec[2] = split_over(x.shape[2], "heads", "tokens") or any_way
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _names(axis):
    return (axis,) if isinstance(axis, str) else axis
