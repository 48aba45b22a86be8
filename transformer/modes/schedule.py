"""The schedule: how the positions of a sequence are split into chunks that run at once.

One chunk is the parallel mode, chunks of one token the sequential mode; what runs is the same f.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.axes import split_over
from transformer.checks import token_ids, whole_number
from transformer.config import Config
from transformer.memory.cache import Cache, check_turn_ended
from transformer.memory.instruction import POSITIONS


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
      TypeError: tokens, start or chunk are not integers.
      ProgramError: f breaks the rule of the cache.
    """
    cache, tokens = checked(f, cache, tokens, start)
    length = len(tokens)
    chunk = length if chunk is None else min(whole_number("chunk", chunk, least=1), length)
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


def parallel(f: Callable, params, cache: Cache, tokens, positions, packed: bool = False):
    """Runs one chunk of a sequence, every token at once.

    Args:
      f, params, cache: as in `run`.
      tokens: [T] int.
      positions: [T] int32, consecutive; -1 marks padding, which comes last.
      packed: whether positions may begin again at 0, for several documents packed in one row. The
        cache then needs as many cells as the row has tokens, and holds the last document after it.

    Returns:
      (cache, logits [T, V]).
    """
    over = jax.vmap(
        _one_token(f),
        in_axes=(None, None, 0, 0),
        out_axes=(None, 0),
        axis_name=POSITIONS,
        spmd_axis_name=split_over(len(tokens), "tokens") or None,
    )
    after, logits = over(params, cache.replace(packed=packed), tokens, positions)
    return after.replace(packed=cache.packed), logits


def _one_token(f):
    """f, checked to have run one whole turn."""

    def checked(params, cache, token, i):
        after, logits = f(params, cache, token, i)
        check_turn_ended(cache, after)
        return after, logits

    return checked


def recompute(f: Callable, params, cache: Cache, tokens):
    """The baseline without a cache: for every token, the whole prefix again.

    Args and returns as in `run`, for an empty cache; the cache comes back as it was.
    """
    cache, tokens = checked(f, cache, tokens, 0)
    length = len(tokens)
    positions = jnp.arange(length, dtype=jnp.int32)

    def last_logits(t):
        seen = jnp.where(positions <= t, positions, -1)
        return parallel(f, params, cache, tokens, seen)[1][t]

    return cache, jax.lax.map(last_logits, positions)


def checked(f: Callable, cache: Cache, tokens, start):
    """What `run` is given, checked: -> (cache, tokens).

    A program may refuse to go on from a cache, as one under edits does where they come too late:
    where it has `admit`, the cache is what `f.admit(cache, start)` returns. The tokens come back as
    an array of JAX, which is narrower than what was given may be.
    """
    config = getattr(f, "config", None)
    config = config if isinstance(config, Config) else None
    tokens = token_ids(tokens, config and config.vocab_size)
    if not isinstance(start, jax.core.Tracer):
        stop = whole_number("start", start) + len(tokens)
        if stop > cache.capacity:
            raise ValueError(
                f"{len(tokens)} tokens from position {start} need {stop} cells, and the "
                f"cache has {cache.capacity}; make it with init_cache(config, capacity=...)."
            )
        if config and config.positions == "learned" and stop > config.max_length:
            raise ValueError(
                f"{len(tokens)} tokens from position {start} need {stop} learned positions, and "
                f"the model has max_length={config.max_length}."
            )
    admit = getattr(f, "admit", lambda cache, _: cache.replace(edited_by=None))
    return admit(cache, start), jnp.asarray(tokens)
