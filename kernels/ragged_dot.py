"""Rows sorted by group, each times the matrix of its group, and the derivatives of that.

By the kernel of a CPU where there is one; `jax.lax.ragged_dot` multiplies all rows by all matrices
there.
"""

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from kernels.cpu.grouped import grouped
from kernels.cpu.grouped import outer as grouped_outer
from kernels.cpu.tiles import TYPES
from kernels.dot import BLOCK, has_kernel
from kernels.tracing import primitive


def ragged_dot(x, w, sizes):
    """x [M, K] times the matrix of each row's group, w [X, K, N] -> [M, N], in the type of x.

    Args:
      x: the rows of a group lie together, in the order of the groups.
      w: of the type of x.
      sizes: [X], int32: the rows of each group. What they do not sum up to are rows of zeros.
    """
    if has_kernel_for(x.dtype):
        return _rows(x, w, sizes)
    return jax.lax.ragged_dot(x, w, sizes)


def has_kernel_for(dtype) -> bool:
    """Whether groups are multiplied by a kernel of ours, in numbers of this type."""
    return has_kernel() and dtype.name in TYPES


def in_order(x, w, sizes, block: int):
    """`ragged_dot` by the kernel, in chains of `block` terms; x and the result are in float32."""
    return ragged_dot_p.bind(x, w, sizes, block=block, by_output=False)[0]


def _rows(x, w, sizes, by_output=False):
    y = ragged_dot_p.bind(x.astype(jnp.float32), w, sizes, block=BLOCK, by_output=by_output)[0]
    return y.astype(x.dtype)


def _outer(x, y, sizes):
    """The gradient of matrices: for each group, the transpose of its rows x times its rows y."""
    wide = (a.astype(jnp.float32) for a in (x, y))
    return outer_p.bind(*wide, sizes, block=BLOCK)[0].astype(x.dtype)


def _run(x, w, sizes, *, block, by_output):
    return [grouped(x, w, sizes, block, "columns" if by_output else "rows")]


def _run_outer(x, y, sizes, *, block):
    return [grouped_outer(x, y, sizes, block)]


def _define(name, run, of_left, of_right):
    """A primitive that is linear in two operands; `of_...(dz, left, right, sizes)` transpose it."""

    def batch(axis, operands, dims, **how):
        del axis
        return primitive.in_turn(made, operands, dims, **how)

    def jvp(fun, primals, moving, tangents, **how):
        del fun
        terms = []
        for n, tangent in zip(moving, tangents, strict=True):
            operands = list(primals)
            operands[n] = tangent
            terms.append(made.bind(*operands, **how)[0])
        return made.bind(*primals, **how), [sum(terms[1:], terms[0])]

    def transpose(cotangents, left, right, sizes, **how):
        [dz] = cotangents
        of, undefined = (of_left, left) if ad.is_undefined_primal(left) else (of_right, right)
        if isinstance(dz, ad.Zero):
            moved = ad.Zero(undefined.aval)
        else:
            moved = of(dz, left, right, sizes, **how).astype(undefined.aval.dtype)
        return [moved, None, None] if undefined is left else [None, moved, None]

    made = primitive.define(name, run, batch, jvp)
    ad.primitive_transposes[made] = transpose
    return made


ragged_dot_p = _define(
    "ragged_dot_by_kernel",
    _run,
    lambda dz, x, w, sizes, block, by_output: _rows(dz, w, sizes, not by_output),
    lambda dz, x, w, sizes, block, by_output: _outer(*((dz, x) if by_output else (x, dz)), sizes),
)
outer_p = _define(
    "ragged_outer_by_kernel",
    _run_outer,
    lambda dz, x, y, sizes, block: _rows(y, dz, sizes, by_output=True),
    lambda dz, x, y, sizes, block: _rows(x, dz, sizes),
)
