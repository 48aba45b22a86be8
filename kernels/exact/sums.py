"""Sums in one order, and products that are rounded before they feed a sum."""

from functools import partial

import jax
import jax.numpy as jnp


@jax.custom_jvp
def rounded(x):
    """x as it is, in numbers that the compiler cannot see through.

    A compiler makes one instruction of a product and the sum that it feeds, which rounds once, or
    two, as the operations happen to share a loop; and it leaves out the rounding to a narrow type
    between two operations of a wide one. (`jax.lax.optimization_barrier` does not help: XLA takes
    it away before it forms loops.) As integers, though, numbers are what they are. The minimum
    changes none of them but one of the many nans.
    """
    integers = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integers)
    bits = jnp.minimum(bits, jnp.iinfo(integers).max - 1)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@rounded.defjvp
def _rounded_jvp(primals, tangents):
    return rounded(*primals), tangents[0]


TILE = 256  # cells of attention whose weights are summed as one tree
WAYS = 32  # terms of a node of the tree: few levels, since each is a loop of its own


def levels(n: int) -> list[tuple[int, int]]:
    """The levels of the tree of n terms: pairs (size, count).

    A level cuts its terms into `count` slices of `size` terms, the last one filled up with zeros,
    and adds them up in pairs.
    """
    found = []
    while n > 1:
        size = -(-n // WAYS)
        found.append((size, -(-n // size)))
        n = size
    return found or [(1, 1)]


def in_pairs(terms):
    """The sum of a list, each with its neighbour first."""
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


def tree(x):
    """The sum over the last axis as a tree, of whose nodes each adds up `WAYS` others in pairs."""
    x = rounded(x)
    for size, count in levels(x.shape[-1]):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size * count - x.shape[-1])])
        x = in_pairs([x[..., n : n + size] for n in range(0, x.shape[-1], size)])
    return x[..., 0]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def short(x, axis):
    """The sum over any axis of at most `WAYS` numbers, as that of `tree`."""
    terms = jnp.moveaxis(rounded(x), axis, 0)
    return in_pairs(list(terms))


@short.defjvp
def _short_jvp(axis, primals, tangents):
    return short(*primals, axis), tangents[0].sum(axis)
