"""Rows times a matrix, and the derivatives of it, by the kernel of a CPU where there is one.

To XLA a kernel is one opaque call, so a program that runs on several devices keeps XLA's products,
which it can split.
"""

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from kernels.cpu import call
from kernels.cpu.matmul import matmul
from kernels.cpu.tiles import TYPES

BLOCK = 512  # terms of a chain
_LEAST_ROWS, _LEAST_SIDE = 8, 48  # of less, the library's products are as fast


def dot(x, w, turned=False, by_output=False):
    """x [M, K] @ w [K, N] -> [M, N], in the type of both.

    Args:
      x, w: arrays of two axes.
      turned: x is [K, M].
      by_output: w is [N, K].
    """
    if has_kernel():
        return dot_p.bind(x, w, turned=turned, by_output=by_output)
    return _library(x, w, turned, by_output)


def has_kernel() -> bool:
    """Whether products are computed by a kernel of ours."""
    return call.is_available() and jax.device_count() == 1


def _library(x, w, turned, by_output):
    return (x.mT if turned else x) @ (w.mT if by_output else w)


def _run(x, w, *, turned, by_output):
    rows, sides = x.shape[turned], (x.shape[not turned], w.shape[not by_output])
    if x.dtype.name not in TYPES or rows < _LEAST_ROWS or min(sides) < _LEAST_SIDE:
        return _library(x, w, turned, by_output)
    layout = "columns" if by_output else "rows"
    return matmul(x.astype(jnp.float32), w, BLOCK, layout, turned).astype(x.dtype)


dot_p = core.Primitive("dot")
dot_p.def_impl(jax.jit(_run, static_argnames=("turned", "by_output")))
mlir.register_lowering(dot_p, mlir.lower_fun(_run, multiple_results=False))


@dot_p.def_abstract_eval
def _(x, w, *, turned, by_output):
    return jax.core.ShapedArray((x.shape[turned], w.shape[not by_output]), x.dtype)


def _batch(axis, operands, dims, **how):
    dims = tuple(dims)
    x, w = (
        operand if dim is None else jnp.moveaxis(operand, dim, 0)
        for operand, dim in zip(operands, dims, strict=True)
    )
    if dims == (None, None):
        return dot(x, w, **how), None
    if dims[1] is None and not how["turned"]:  # more rows
        y = dot(x.reshape(-1, x.shape[-1]), w, **how)
        return y.reshape(axis.size, -1, y.shape[-1]), 0
    return _library(x, w, **how), 0


def _of_rows(dy, x, w, *, turned, by_output):
    """The cotangent of x."""
    return dot(w, dy, by_output, True) if turned else dot(dy, w, False, not by_output)


def _of_matrix(dy, x, w, *, turned, by_output):
    """The cotangent of w."""
    return dot(dy, x, True, turned) if by_output else dot(x, dy, not turned, False)


ad.defbilinear(dot_p, _of_rows, _of_matrix)
batching.fancy_primitive_batchers[dot_p] = _batch
