"""Completions of prompts: the prompts run in chunks, then one token at a time, as a batch.

Both phases are compiled once for a batch size and a capacity, of which there are two between one
power of two and the next: the lengths of the prompts, the number of new tokens and the way of
sampling are data.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer.checks import whole_number
from transformer.inference.completion import Completion, Piece, Writer
from transformer.inference.options import Options, takes_options
from transformer.inference.prompts import prompt_keys, prompt_tokens, stop_conditions
from transformer.inference.sampling import sample
from transformer.memory.cache import Cache
from transformer.modes.schedule import parallel
from transformer.program.experts import Experts
from transformer.program.fit import check_params
from transformer.program.init import init_cache
from transformer.program.linear import Linear
from transformer.program.params import Params
from transformer.program.program import program

PREFILL_CHUNK = 64  # prompt tokens that run at once
MAX_STEPS = 32  # of generation in one call of compiled code
MIN_CAPACITY = 512
MIN_STOP_TOKENS = 8


@takes_options
def generate(model, prompts: Sequence[str | Sequence[int]], **options) -> list[Completion]:
    """Completes prompts, as one batch in which each gets what it would get alone.

    The randomness of a completion comes from the seed, its prompt, and how often the same prompt
    came before in the batch: a prompt gives the same alone and in any batch, and repeated prompts
    give different samples.

    Args:
      model: config, params and tokenizer.
      prompts: each is a text, which begins a document, or token ids [T], taken as they are.
      **options: the fields of `Options`, of which max_new_tokens must be given. Ids that the
        tokenizer does not have are never drawn.

    Returns:
      One completion per prompt, in their order.

    Raises:
      ValueError: no prompts, an empty prompt, ids outside of the vocabulary, a prompt that with its
        new tokens exceeds config.max_length, an option outside of its range, or parameters that do
        not belong to the config.
      TypeError: prompts is not a sequence of texts and ids, or an option has the wrong type.
      FloatingPointError: the model's logits are not finite.
    """
    pieces = stream(model, prompts, every=MAX_STEPS, **options)
    completions = {piece.index: piece.completion for piece in pieces if piece.completion}
    return [completions[index] for index in range(len(prompts))]


@takes_options
def stream(
    model, prompts: Sequence[str | Sequence[int]], *, every: int = 1, **options
) -> Iterator[Piece]:
    """`generate`, piece by piece as the text comes.

    The pieces of one prompt, joined, are the text of its completion; text that may turn out to be
    the beginning of a stop text is held back until that is known.

    Args:
      model: as in `generate`.
      prompts: as in `generate`.
      **options: as in `generate`, and so are the errors, raised before anything runs.
      every: how many tokens run between two pieces of a text, 1 to MAX_STEPS: text comes sooner
        with fewer, and faster with more.
    """
    options = Options(**options)
    config, tokenizer = model.config, model.tokenizer
    check_params(config, model.params)
    own = program(config, numerics=options.numerics, attention=options.attention)
    f = options.program or own
    if whole_number("every", every, least=1) > MAX_STEPS:
        raise ValueError(f"every={every}; it must be between 1 and {MAX_STEPS}.")
    rows = prompt_tokens(config, tokenizer, prompts, options.max_new_tokens)
    stops = stop_conditions(config, tokenizer, options.stop)
    return _stream(f, model, rows, stops, options, every)


def capacity_for(num_tokens: int) -> int:
    """Cells of the cache that sequences of so many tokens get: 2^n or 3/4 of it, at least 512."""
    capacity = _power_of_two(num_tokens, MIN_CAPACITY)
    return max(MIN_CAPACITY, capacity * 3 // 4 if num_tokens <= capacity * 3 // 4 else capacity)


def stop_ids(tokens) -> np.ndarray:
    """Token ids as compiled code takes them: int32 [M], of few different sizes, filled with -1."""
    ids = np.full(_power_of_two(len(tokens), MIN_STOP_TOKENS), -1, np.int32)
    ids[: len(tokens)] = sorted(tokens)
    return ids


def cast_params(config, params: Params) -> Params:
    """Parameters in the type in which the program uses them, so that no step casts them again."""
    return params if config.compute_dtype == jnp.float32 else _cast(config, params)


def _stream(f, model, rows, stops, options, every):
    stop_texts, stop_tokens = stops
    max_new_tokens = options.max_new_tokens
    tokenizer = model.tokenizer
    sampling = options.sampling(tokenizer.vocab_size if tokenizer else None)
    keys = prompt_keys(rows, options.seed)
    params = cast_params(model.config, model.params)
    capacity = capacity_for(max(map(len, rows)) + max_new_tokens)
    tokens = np.stack([np.pad(row, (0, capacity - len(row))) for row in rows])
    last = np.array([len(row) - 1 for row in rows], np.int32)
    num_chunks = np.int32(-(-last.max() // PREFILL_CHUNK))
    cache = _prefill(model.config, f, params, tokens, last, num_chunks)
    state = State(cache, tokens[np.arange(len(rows)), last], last, keys)
    stops = stop_ids(stop_tokens)

    writers = [Writer(model.tokenizer, stop_texts, stop_tokens, max_new_tokens) for _ in rows]
    running = np.ones(len(rows), bool)
    left = max_new_tokens
    while running.any():
        steps = np.int32(min(every, left))
        state, *drawn = decode(f, params, state, running, sampling, stops, steps)
        for token, logprob in zip(*(np.asarray(x)[:steps] for x in drawn), strict=True):
            for index in np.flatnonzero(running).tolist():
                text = writers[index].push(int(token[index]), float(logprob[index]))
                completion = writers[index].completion
                running[index] = completion is None
                if text or completion:
                    yield Piece(index, text, completion)
        left -= steps


@struct.dataclass
class State:
    """A sequence while it is generated.

    cache: what the positions before i have written. token: int32, the token at position i, not run
    yet. key: uint32 [2], the sequence's own.
    """

    cache: Cache
    token: jax.Array
    i: jax.Array
    key: jax.Array


@partial(jax.jit, static_argnames="config")
def _cast(config, params: Params) -> Params:
    cast = partial(jax.tree.map, lambda x: x.astype(config.compute_dtype))
    matrices = (Linear, Experts)
    is_matrix = lambda x: isinstance(x, matrices)
    params = jax.tree.map(lambda x: cast(x) if is_matrix(x) else x, params, is_leaf=is_matrix)
    return params.replace(embedding=cast(params.embedding))


@partial(jax.jit, static_argnames=("config", "f"))
def _prefill(config, f, params, tokens, lengths, num_chunks):
    """The cache of each row after its first tokens.

    tokens: [B, capacity]; lengths: [B], how many of them to run; num_chunks: scalar.
    """
    rows, capacity = tokens.shape
    cache = init_cache(config, capacity)
    cache = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), cache)

    def chunk(n, cache):
        positions = n * PREFILL_CHUNK + jnp.arange(PREFILL_CHUNK, dtype=jnp.int32)

        def row(cache, tokens, length):
            tokens = jax.lax.dynamic_slice(tokens, positions[:1], (PREFILL_CHUNK,))
            return parallel(f, params, cache, tokens, jnp.where(positions < length, positions, -1))

        return jax.vmap(row)(cache, tokens, lengths)[0]  # the logits are never computed

    return jax.lax.fori_loop(0, num_chunks, chunk, cache)


@partial(jax.jit, static_argnames="f", donate_argnames="state")
def decode(f, params, state, running, sampling, stop_ids, steps):
    """Draws up to `steps` tokens of each running row.

    Args:
      state: with a leading axis of rows.
      running: [B] bool. A row that does not run, or no longer, is padding.
      stop_ids: [M]; a row that draws one stops running.
      steps: scalar, at most MAX_STEPS. Fewer run where all rows have stopped.

    Returns:
      state; tokens [MAX_STEPS, B] and their logprobs, of which the first `steps` were drawn. What a
      row drew after it stopped has no meaning.
    """
    rows = running.shape[0]

    def step(state, running):
        cache, logits = f(params, state.cache, state.token, jnp.where(running, state.i, -1))
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        token, logprob = sample(jax.random.fold_in(key, state.i), logits, sampling)
        return State(cache, token, state.i + 1, state.key), logprob

    def unfinished(carry):
        n, _, running, _, _ = carry
        return (n < steps) & running.any()

    def advance(carry):
        n, state, running, tokens, logprobs = carry
        state, logprob = jax.vmap(step)(state, running)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, state.token, n, 0)
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob, n, 0)
        running &= (state.token[:, None] != stop_ids).all(1)
        return n + 1, state, running, tokens, logprobs

    tokens = jnp.zeros((MAX_STEPS, rows), jnp.int32), jnp.zeros((MAX_STEPS, rows), jnp.float32)
    _, state, _, *drawn = jax.lax.while_loop(
        unfinished, advance, (jnp.int32(0), state, running, *tokens)
    )
    return state, *drawn


def _power_of_two(n, minimum):
    return max(minimum, 1 << (int(n) - 1).bit_length())
