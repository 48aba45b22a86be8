"""What people give, checked where it comes in: whole numbers and token ids."""

import operator

import jax
import jax.numpy as jnp
import numpy as np


def whole_number(name: str, value, least: int = 0) -> int:
    """Returns a whole number that somebody gave, as Python's int.

    Raises:
      TypeError: it is not a whole number.
      ValueError: it is below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}={value!r} is of type {type(value).__name__}; it must be a whole number, at "
            f"least {least}."
        ) from None
    if number < least:
        raise ValueError(f"{name}={number}; it must be at least {least}.")
    return number


def token_ids(tokens, vocab_size: int | None = None, what: str = "tokens"):
    """Returns the token ids of one sequence as an array [T] of integers, checked.

    Args:
      tokens: [T], at least one; NumPy's or JAX's array, or a list. Ids whose values are not known
        yet, as inside of jax.jit, pass.
      vocab_size: V; None: ids are not compared with it.
      what: what the message calls them.

    Raises:
      ValueError: not one axis, no tokens, or an id outside of 0..V-1, which JAX would silently
        clamp.
      TypeError: the ids are not integers.
    """
    try:
        tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    except ValueError:  # lists of several lengths
        raise TypeError(f"{what} must be one list of token ids, and are {tokens!r}.") from None
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(
            f"{what} must have the shape [T], with at least one token, and have the shape "
            f"{list(tokens.shape)}; use jax.vmap for a batch."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{what} must be integers, and hold {tokens.dtype}.")
    if vocab_size is not None and not isinstance(tokens, jax.core.Tracer):
        values = np.asarray(tokens)
        wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
        if len(wrong):
            raise ValueError(
                f"{what}: token id {values[wrong[0]]} at {wrong[0]} is outside of the vocabulary, "
                f"0 to {vocab_size - 1}; is this another model's tokenizer?"
            )
    return tokens
