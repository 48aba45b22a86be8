"""Which positions an edit is about."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def positions(name: str, given: int | Sequence[int] | range | None):
    """Returns positions as an array [M] of int32, or None for all.

    Args:
      name: what a message calls them.
      given: one position, several, or None: all. Values that are not known yet, as inside of
        jax.jit, pass.

    Raises:
      TypeError: they are not integers.
      ValueError: one is below 0, or they do not form one list.
    """
    if given is None:
        return None
    array = given if isinstance(given, jax.Array) else np.asarray(given)
    if array.size and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}={given!r}; positions must be whole numbers, or None for all.")
    if array.ndim > 1:
        raise ValueError(f"{name} have the shape {list(array.shape)}; give one list of positions.")
    if not isinstance(array, jax.core.Tracer) and (np.asarray(array) < 0).any():
        raise ValueError(f"{name}={given!r}; positions count from 0. A last one is length - 1.")
    if isinstance(array, jax.core.Tracer):
        return jnp.atleast_1d(array.astype(jnp.int32))
    return np.atleast_1d(np.asarray(array, np.int32))  # NumPy's: known also while others trace


def among(i, positions):
    """Whether i [...] is one of the positions [M], or of all (None): bool [...]."""
    if positions is None:
        return jnp.ones(jnp.shape(i), bool)
    return (jnp.asarray(i)[..., None] == jnp.asarray(positions)).any(-1)


def first(positions) -> int:
    """The first of the positions; 0 where they are all, or not known yet."""
    if positions is None or isinstance(positions, jax.core.Tracer):
        return 0
    return int(positions.min()) if positions.size else np.iinfo(np.int32).max


def last(positions) -> int:
    """The last of the positions; -1 where none is named, or they are not known yet."""
    if positions is None or isinstance(positions, jax.core.Tracer) or not positions.size:
        return -1
    return int(positions.max())


def token_index(index, count: int):
    """Indices of tokens of a trace of `count`, from the end where negative: checked if known.

    Raises:
      ValueError: there is no such token, which JAX would take for the nearest that there is.
    """
    if isinstance(index, slice):
        return index
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(index)):
        return jnp.asarray(index)
    index = np.asarray(index)
    wrong = index[(index < -count) | (index >= count)]
    if wrong.size:
        raise ValueError(f"token {wrong[0]} of {count}; give an index from 0 to {count - 1}.")
    return index
