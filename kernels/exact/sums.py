"""Sums in one order, and computations that stand by themselves."""

import jax
import jax.numpy as jnp

_LEVELS = 5  # of a tree of halves that are one computation: 32 terms


def apart(tree):
    """The same arrays, of which the compiler makes no part of what is computed from them.

    A product that feeds a sum would otherwise be rounded or not, as the two happen to share a loop.
    """
    return jax.lax.optimization_barrier(tree)


def alone(function):
    """`function` of arrays as a computation by itself, of which gradients keep the operands only.

    What else a gradient kept would be used twice, and so be rounded where it is not otherwise. The
    gradient computes it again.
    """
    again = jax.checkpoint(function)
    return lambda *operands: apart(again(*apart(operands)))


@jax.custom_jvp
def total(x):
    """The sum over the last axis as a tree: the second half is added to the first, and so on."""
    x, level = apart(x), 0
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        rest = x[..., half:]
        if x.shape[-1] % 2:
            rest = jnp.pad(rest, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
        x, level = x[..., :half] + rest, level + 1
        if level % _LEVELS == 0:
            x = apart(x)
    return apart(x[..., 0])


@total.defjvp
def _total_jvp(primals, tangents):
    return total(*primals), tangents[0].sum(-1)
