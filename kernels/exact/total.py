"""Sums over the last axis in the tree of `kernels.exact.sums`, by a kernel where there is one."""

import jax.numpy as jnp

from kernels.cpu import rows
from kernels.dot import has_kernel
from kernels.exact import functions
from kernels.exact.sums import tree
from kernels.tracing import primitive

_LEAST, _LEAST_TERMS = 1024, 64  # of fewer numbers, calls of a kernel cost more than they save


def total(x):
    """The sum over the last axis of x [..., n], in one order; its derivative is that of a sum."""
    return total_p.bind(x)[0]


def powers(x):
    """The largest number over the last axis of x [..., n], and the sum of exp(x - largest) [...].

    The largest number counts as a constant, and is 0 where all numbers are -inf.
    """
    return tuple(powers_p.bind(x))


def has_kernel_for(x) -> bool:
    """Whether a kernel sums up the rows of x."""
    enough = x.size >= _LEAST and x.shape[-1] >= _LEAST_TERMS
    return enough and x.dtype == jnp.float32 and has_kernel()


def _total(x):
    if has_kernel_for(x):
        return [rows.sums(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])]
    return [tree(x)]


def _powers(x):
    if has_kernel_for(x):
        results = rows.sums_of_powers(x.reshape(-1, x.shape[-1]))
        return [y.reshape(x.shape[:-1]) for y in results]
    peak = x.max(-1)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    return [peak, tree(functions.exp(x - peak[..., None]))]


def _total_jvp(fun, primals, moving, tangents):
    del fun, moving
    return total_p.bind(*primals), [tangents[0].sum(-1)]


def _powers_jvp(fun, primals, moving, tangents):
    del fun, moving
    peak, whole = powers_p.bind(*primals)
    shares = jnp.exp(primals[0] - peak[..., None])
    return [peak, whole], [jnp.zeros_like(peak), (shares * tangents[0]).sum(-1)]


total_p = primitive.define(
    "total", _total, lambda *args: primitive.in_front(total_p, *args), _total_jvp
)
powers_p = primitive.define(
    "powers", _powers, lambda *args: primitive.in_front(powers_p, *args), _powers_jvp
)
