"""Cells of int8 numbers: those of a head share a scale, and a quarter of the memory of float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.exact.sums import rounded


class Int8(NamedTuple):
    """An array that stands where one of floats could: its numbers are numbers * scales.

    numbers: int8 [..., H]. scales: float32 [..., 1].
    """

    numbers: jax.Array
    scales: jax.Array


@jax.custom_jvp
def quantise(x: jax.Array) -> Int8:
    """Rounds x [..., H] to 255 steps, from the largest of H numbers to its negative."""
    x = x.astype(jnp.float32)
    scales = rounded(jnp.abs(x).max(-1, keepdims=True) / 127)
    steps = rounded(x / jnp.where(scales == 0, 1, scales))
    return Int8(jnp.rint(steps).astype(jnp.int8), scales)


@quantise.defjvp
def _no_gradient(primals, tangents):
    del primals, tangents
    raise NotImplementedError(
        "cells in int8 have no gradient, as they are rounded; to train, take a config with "
        "cache_dtype=None."
    )


def is_int8(x) -> bool:
    """Whether x is `Int8`."""
    return isinstance(x, Int8)


def floats(tree, dtype=jnp.float32):
    """A pytree in which arrays of floats stand for those in `Int8`; others stay as they are."""
    dense = lambda x: rounded(x.numbers * x.scales).astype(dtype) if is_int8(x) else x
    return jax.tree.map(dense, tree, is_leaf=is_int8)
