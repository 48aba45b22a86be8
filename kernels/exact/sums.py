"""Sums in one order, and products that are rounded before they feed a sum."""

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


_WAYS = 32  # terms of a node of the tree: few levels, since each is a loop of its own


@jax.custom_jvp
def total(x):
    """The sum over the last axis as a tree, of whose nodes each adds up `_WAYS` others in pairs."""
    x = rounded(x)
    while x.shape[-1] > 1:
        size = -(-x.shape[-1] // _WAYS)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
        x = _in_pairs([x[..., n : n + size] for n in range(0, x.shape[-1], size)])
    return x[..., 0]


def _in_pairs(terms):
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


@total.defjvp
def _total_jvp(primals, tangents):
    return total(*primals), tangents[0].sum(-1)
