"""Logical axes of arrays, and the axes of a mesh of devices that each of them is split over.

This is the one table that says how arrays lie on several devices. Where parameters, the optimizer's
state and batches lie follows from it (`transformer.devices.layout`), and so does what the compiler
is told of activations (`constrain`).
"""

import math

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

    None of them where they do not divide it: a prompt, for instance, may have any length.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    names = tuple(n for axis in axes for n in _names(RULES[axis]) if shape.get(n, 1) > 1)
    return names if size % math.prod(shape[n] for n in names) == 0 else ()


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
