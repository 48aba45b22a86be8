"""The schedule: how the positions of a sequence are split into chunks that run at once.

One chunk is the parallel mode, chunks of one token the sequential mode; what runs is the same f.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from transformer.memory.cache import Cache


def run(f: Callable, params, cache: Cache, tokens, start=0, chunk: int | None = None):
    """Runs a program over the tokens of one sequence; `jax.vmap` makes it a batch.

    Any split into chunks gives the same cache and logits, to the rounding of the matrix products.

    Args:
      f: a program, (params, cache, token, i) -> (cache, logits).
      params: its parameters.
      cache: what the positions before `start` have written.
      tokens: [T] int.
      start: position of the first token.
      chunk: tokens that run at once. None: all of them, the parallel mode. 1: the sequential mode.
        T need not be a multiple of it.

    Returns:
      (cache, logits [T, V]).

    Raises:
      ValueError: chunk below 1, no tokens, start below 0, more tokens than the cache has room for
        or learned positions exist for, or token ids outside of the vocabulary (start and ids as far
        as the values are known when tracing).
      TypeError: tokens are no integers.
      ProgramError: f breaks the rule of the cache.
    """
    tokens = _checked(params, cache, tokens, start, chunk)
    length = len(tokens)
    chunk = length if chunk is None else min(chunk, length)
    positions = start + jnp.arange(length, dtype=jnp.int32)
    if chunk == length:
        return parallel(f, params, cache, tokens, positions)

    def step(cache, inputs):
        if chunk > 1:
            return parallel(f, params, cache, *inputs)
        token, i = (x[0] for x in inputs)
        cache, logits = _one_token(f)(params, cache, token, i)
        return cache, logits[None]

    whole = length - length % chunk
    split = lambda x: x[:whole].reshape(-1, chunk)
    cache, logits = jax.lax.scan(step, cache, (split(tokens), split(positions)))
    logits = logits.reshape(whole, -1)
    if whole == length:
        return cache, logits
    cache, rest = parallel(f, params, cache, tokens[whole:], positions[whole:])
    return cache, jnp.concatenate([logits, rest])


def parallel(f: Callable, params, cache: Cache, tokens, positions, cells=None):
    """One chunk: every token at once.

    Args:
      f, params, cache: as in `run`.
      tokens, positions: [T]; positions are consecutive, -1 marks padding at the end.
      cells: [T] consecutive cells, where they differ from the positions because several documents
        are packed in one row; each document's positions start at 0.

    Returns:
      (cache, logits [T, V]).
    """
    over = (tokens, positions) if cells is None else (tokens, positions, cells)
    axes = (None, None, *(0,) * len(over))
    return jax.vmap(_one_token(f), in_axes=axes, out_axes=(None, 0))(params, cache, *over)


def _one_token(f):
    """f, checked to have run one whole token."""

    def checked(params, cache, *operands):
        after, logits = f(params, cache, *operands)
        after.check_token(cache)
        return after, logits

    return checked


def recompute(f: Callable, params, cache: Cache, tokens):
    """The baseline without a cache: for every token, the whole prefix again.

    Args and returns as in `run`, for an empty cache; the cache comes back as it was.
    """
    tokens = _checked(params, cache, tokens, 0, None)
    length = len(tokens)
    positions = jnp.arange(length, dtype=jnp.int32)

    def last_logits(t):
        seen = jnp.where(positions <= t, positions, -1)
        return parallel(f, params, cache, tokens, seen)[1][t]

    return cache, jax.lax.map(last_logits, positions)


def check_tokens(tokens, vocab_size: int) -> None:
    """Refuses token ids outside of 0..vocab_size-1, which JAX would silently clamp.

    Raises:
      ValueError: names the first such id and where it stands.
    """
    tokens = np.asarray(tokens)
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        place = tuple(int(n) for n in wrong[0])
        raise ValueError(
            f"token id {tokens[place]} at {', '.join(map(str, place))} is outside of the "
            f"vocabulary, 0 to {vocab_size - 1}; is this another model's tokenizer?"
        )


def _checked(params, cache, tokens, start, chunk):
    """The tokens as an array of JAX, which is narrower than what was given may be."""
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(
            f"tokens are [T] with at least one token, and have shape {tokens.shape}; "
            "use jax.vmap for a batch."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens are integers, and hold {tokens.dtype}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}; a chunk is at least 1 token, or None for all at once.")
    if not isinstance(start, jax.core.Tracer):
        stop = operator.index(start) + len(tokens)
        learned = getattr(params, "positions", None)
        if start < 0:
            raise ValueError(f"start={start}; positions begin at 0.")
        if stop > cache.capacity:
            raise ValueError(
                f"{len(tokens)} tokens from position {start} need {stop} cells, and the "
                f"cache has {cache.capacity}; make it with init_cache(config, capacity=...)."
            )
        if learned is not None and stop > len(learned):
            raise ValueError(
                f"{len(tokens)} tokens from position {start} need {stop} learned positions, and "
                f"the model has max_length={len(learned)}."
            )
    if not isinstance(tokens, jax.core.Tracer) and hasattr(params, "vocab_size"):
        check_tokens(tokens, params.vocab_size)
    return jnp.asarray(tokens)
