"""Tokens drawn one at a time, each row of a batch at its own position.

Compiled once for a number of rows and a capacity, of which there are two between one power of two
and the next: lengths, the number of steps and the way of sampling are data.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer.axes import constrain, over_sequences
from transformer.inference.adjust import Adjustments, Written
from transformer.inference.drawn import Drawn, Wanted, draw_token
from transformer.inference.sampling import Sampling
from transformer.memory.cache import Cache
from transformer.numerics.numerics import numerics_of
from transformer.program.params import Params

MAX_STEPS = 32  # of generation in one call of compiled code
MIN_CAPACITY = 512
MIN_STOP_TOKENS = 8


@struct.dataclass
class State:
    """A sequence while it is generated.

    cache: what the positions before i have written. token: int32, the token at position i, not run
    yet. key: uint32 [2], the sequence's own. written: where logits depend on it, else None.
    """

    cache: Cache
    token: jax.Array
    i: jax.Array
    key: jax.Array
    written: Written | None = None


@partial(jax.jit, static_argnames=("f", "wanted"), donate_argnames="state")
def decode(
    f: Callable,
    params: Params,
    state: State,
    running: jax.Array,
    sampling: Sampling,
    stop_ids: jax.Array,
    steps: jax.Array,
    least: jax.Array = 1,
    adjust: Adjustments = Adjustments(),  # noqa: B008, it is immutable
    wanted: Wanted = Wanted(),  # noqa: B008, likewise
) -> tuple[State, jax.Array, Drawn]:
    """Draws up to `steps` tokens of each running row.

    Args:
      f, params: the program and its parameters.
      state: with a leading axis of rows.
      running: [B] bool. A row that does not run, or no longer, is padding.
      sampling: how tokens are drawn.
      stop_ids: [M]; a row that draws one stops running.
      steps: scalar, at most MAX_STEPS.
      least: scalar; no more steps follow where fewer rows run.
      adjust: what is done to logits before.
      wanted: what is told beside tokens and their logprobs.

    Returns:
      state; how many steps were run; and what was drawn, arrays [MAX_STEPS, B, ...] of which so
      many steps are filled. What a row drew after it stopped has no meaning.
    """

    def step(params, sampling, adjust, state, running):
        cache, logits = f(params, state.cache, state.token, jnp.where(running, state.i, -1))
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        key, i, written = jax.random.fold_in(key, state.i), state.i + 1, state.written
        drawn = draw_token(key, logits, written, sampling, adjust, numerics_of(f), wanted)
        written = None if written is None else written.push(drawn.token, i)
        return State(cache, drawn.token, i, state.key, written), drawn

    def unfinished(carry):
        n, _, running, _ = carry
        return (n < steps) & (running.sum() >= least)

    def advance(carry):
        n, state, running, drawn = carry
        state, new = step_all(state, running)
        put = lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, n, 0)
        running &= (state.token[:, None] != stop_ids).all(1)
        return n + 1, state, running, jax.tree.map(put, drawn, new)

    mapped = jax.vmap(step, in_axes=(None, None, None, 0, 0))
    # Traced once, by `jit`, though its results are asked for their shapes before.
    mapped = jax.jit(over_sequences(mapped, len(running), num_shared=3))
    step_all = partial(mapped, params, sampling, adjust)
    shapes = jax.eval_shape(step_all, state, running)[1]
    drawn = jax.tree.map(lambda x: jnp.zeros((MAX_STEPS, *x.shape), x.dtype), shapes)
    n, state, _, drawn = jax.lax.while_loop(
        unfinished, advance, (jnp.int32(0), state, running, drawn)
    )
    return state, n, jax.tree.map(constrain, drawn)  # whole, for every process reads it


def capacity_for(num_tokens: int) -> int:
    """Cells of the cache that sequences of so many tokens get: 2^n or 3/4 of it, at least 512."""
    capacity = _power_of_two(num_tokens, MIN_CAPACITY)
    return max(MIN_CAPACITY, capacity * 3 // 4 if num_tokens <= capacity * 3 // 4 else capacity)


def stop_ids(tokens) -> np.ndarray:
    """Token ids as compiled code takes them: int32 [M], of few different sizes, filled with -1."""
    ids = np.full(_power_of_two(len(tokens), MIN_STOP_TOKENS), -1, np.int32)
    ids[: len(tokens)] = sorted(tokens)
    return ids


def _power_of_two(n, minimum):
    return max(minimum, 1 << (int(n) - 1).bit_length())
