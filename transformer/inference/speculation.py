"""Speculative decoding: tokens are guessed cheaply, and the model checks the guesses at once.

A step runs the next token and the drafts behind it as one chunk of the parallel mode, and draws a
token at each of its positions with the randomness that this position has anyway. Drafts count as
far as they are what was drawn, and one token more is won. So the completion is the one that there
would be without drafts, token for token, drawn or greedy, to the rounding of the products of
chunks of another size (arXiv:2211.17192 and arXiv:2302.01318 keep the distribution alone).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from transformer.axes import constrain, over_sequences
from transformer.checks import whole_number
from transformer.config import Config
from transformer.inference.decode import State
from transformer.inference.drawn import Drawn, draw_token
from transformer.inference.prefill import Prefill
from transformer.inference.prepare import cast_params, lay_out_params
from transformer.inference.rows import Rows, put_row
from transformer.inference.sampling import sample
from transformer.modes.schedule import parallel
from transformer.numerics.numerics import numerics_of
from transformer.program.program import program


@dataclass(frozen=True)
class Lookup:
    """Drafts that are looked up: what came before after the same few tokens.

    It costs nothing to guess, and guesses well where a completion repeats its prompt.

    Attributes:
      tokens: how many are guessed at most, at least 1.
      longest: how many tokens before must be the same; where none were, one less, down to 1.
    """

    tokens: int = 8
    longest: int = 3

    def __post_init__(self):
        whole_number("tokens", self.tokens, least=1)
        whole_number("longest", self.longest, least=1)

    def drafter(self, rows: "SpeculativeRows") -> "_Lookup":
        """What makes the drafts of a batch."""
        return _Lookup(self, rows)


@dataclass(frozen=True, eq=False)
class Smaller:
    """Drafts by another model, which draws with the randomness of the one that checks it.

    Attributes:
      model: config and params, with the same vocabulary.
      tokens: how many are guessed, at least 1.
    """

    model: object
    tokens: int = 4

    def __post_init__(self):
        whole_number("tokens", self.tokens, least=1)

    def drafter(self, rows: "SpeculativeRows") -> "_Smaller":
        """What makes the drafts of a batch.

        Raises:
          ValueError: the vocabularies differ in size.
        """
        return _Smaller(self, rows)


class SpeculativeRows(Rows):
    """Rows whose steps draw several tokens at once.

    Attributes:
      drafts_made, drafts_taken: how many tokens were guessed so far, and were right.
    """

    def __init__(self, f, model, prompts, stop_tokens, options, adjust):
        """As in `Rows`; options.draft says where drafts come from."""
        self.drafts_made = self.drafts_taken = 0
        self._rolls_back = changes_cells(model.config)
        super().__init__(f, model, prompts, stop_tokens, options, adjust)
        self._drafter = options.draft.drafter(self)

    def put(self, row: int, n: int) -> None:
        """As in `Rows`."""
        super().put(row, n)
        self._drafter.begin(row, self.prompts[n])

    def decode(self, running: np.ndarray, steps: int, least: int) -> Iterator[tuple[int, Drawn]]:
        """Runs one step: as many tokens of a row as its drafts were right, and one more."""
        before = jnp.copy(self.state.token), jnp.copy(self.state.i)  # the state is given away
        drafts = self._drafter.propose(running)
        self.state, counts, drawn = verify(
            self.f,
            self.laid_out,
            self.state,
            drafts,
            running,
            self.sampling,
            self.adjust,
            self.wanted,
            self._rolls_back,
        )
        self.steps_run += 1
        counts, drawn = np.asarray(counts), jax.tree.map(np.asarray, drawn)
        self._drafter.accept(running, before, drafts, counts, drawn.token)
        drafts = np.asarray(drafts)
        for row in np.flatnonzero(running).tolist():
            self.drafts_made += int((drafts[row] >= 0).sum())
            self.drafts_taken += int(counts[row]) - 1
            for n in range(counts[row]):
                yield row, drawn.at(row, n)


def changes_cells(config: Config) -> bool:
    """Whether a token that turns out wrong changes what was there before it.

    It writes its own cell, which the right one writes again; but a state has taken it in, and in
    the ring of a window it lies where an older cell was.
    """
    return any(kind == "delta" or window is not None for kind, window in config.layers)


@partial(jax.jit, static_argnames=("f", "wanted", "rolls_back"), donate_argnames="state")
def verify(f, params, state: State, drafts, running, sampling, adjust, wanted, rolls_back):
    """Runs the token of each row and its drafts, and draws a token behind each.

    Args:
      f, params, state, running, sampling, adjust, wanted: as in `inference.decode.decode`.
      drafts: [B, D], -1 behind the last.
      rolls_back: whether the tokens that count run once more, from the cache before.

    Returns:
      state; how many tokens count of each row, [B]; and arrays [B, D + 1, ...] as in `decode`.
    """

    def row(params, sampling, adjust, state, drafts, running):
        tokens, guessed = jnp.concatenate([state.token[None], drafts]), (drafts >= 0).sum()
        n = jnp.arange(len(tokens), dtype=jnp.int32)
        run = lambda count: parallel(
            f,
            params,
            state.cache,
            jnp.maximum(tokens, 0),
            jnp.where(running & (n < count), state.i + n, -1),
        )
        cache, logits = run(guessed + 1)
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")

        def draw(written, inputs):
            logits, token, i = inputs
            # The first token is there already.
            if written is not None:
                push = written.push(token, i)
                written = jax.tree.map(lambda x, y: jnp.where(i > state.i, y, x), written, push)
            own = jax.random.fold_in(key, i)
            drawn = draw_token(own, logits, written, sampling, adjust, numerics_of(f), wanted)
            return written, (drawn, written)

        inputs = logits, tokens, state.i + n
        _, (drawn, written) = jax.lax.scan(draw, state.written, inputs)
        right = jnp.cumprod((drawn.token[:-1] == drafts) & (n[1:] <= guessed)).sum()
        if rolls_back:
            cache = run(right + 1)[0]
        token, i = drawn.token[right], state.i + right + 1
        if written is not None:
            written = jax.tree.map(lambda x: x[right], written).push(token, i)
        return State(cache, token, i, state.key, written), right + 1, drawn

    shared, own = (params, sampling, adjust), (state, drafts, running)
    state, counts, drawn = _each_row(row, shared, own)
    # Whole, for every process reads them.
    return state, constrain(counts), jax.tree.map(constrain, drawn)


def _each_row(function, shared, own):
    """Runs a function of one row for all of them, on the devices that they lie on.

    Args:
      function: takes what is in `shared`, then one row of what is in `own`.
      own: trees of arrays [B, ...].
    """
    axes = (None,) * len(shared) + (0,) * len(own)
    rows = jax.vmap(function, in_axes=axes)
    return over_sequences(rows, len(own[-1]), num_shared=len(shared))(*shared, *own)


def look_up(tokens: Sequence[int], count: int, longest: int) -> list[int]:
    """What followed after the latest place where the last few tokens stood before.

    Args:
      tokens: so far.
      count: how many to return at most.
      longest: as in `Lookup`.
    """
    tokens = np.asarray(tokens)
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        places = np.flatnonzero((windows == tokens[-size:]).all(1))
        if len(places):
            begin = places[-1] + size
            return tokens[begin : begin + count].tolist()
    return []


class _Lookup:
    """Drafts of `Lookup`, made on the host."""

    def __init__(self, options, rows):
        self._options = options
        self._tokens = [prompt.tolist() for prompt in rows.prompts[: rows.size]]

    def begin(self, row, prompt):
        self._tokens[row] = prompt.tolist()

    def propose(self, running):
        drafts = np.full((len(running), self._options.tokens), -1, np.int32)
        for row in np.flatnonzero(running):
            found = look_up(self._tokens[row], self._options.tokens, self._options.longest)
            drafts[row, : len(found)] = found
        return drafts

    def accept(self, running, before, drafts, counts, drawn):
        for row in np.flatnonzero(running):
            self._tokens[row] += drawn[row, : counts[row]].tolist()


class _Smaller:
    """Drafts of `Smaller`: the other model's cache of each row."""

    def __init__(self, options, rows):
        config = options.model.config
        if config.vocab_size != rows.vocab_size:
            raise ValueError(
                f"the model that drafts has vocab_size={config.vocab_size}, and the other "
                f"{rows.vocab_size}; they must read the same tokens."
            )
        self._f, self._params = program(config), cast_params(config, options.model.params)
        self._prefill = Prefill(config, self._f, self._params, rows.capacity, rows.prompts)
        self._laid_out = lay_out_params(self._f, self._params)
        self._count, self._rows = options.tokens, rows
        self._rolls_back = changes_cells(config)
        self._cache = self._prefill(rows.prompts[: rows.size])

    def begin(self, row, prompt):
        self._cache = put_row(self._cache, np.int32(row), self._prefill([prompt]))

    def propose(self, running):
        rows = self._rows
        self._after, drafts = _propose(
            self._f, self._laid_out, self._cache, rows.state, running, rows.sampling, self._count
        )
        return drafts

    def accept(self, running, before, drafts, counts, drawn):
        if not self._rolls_back:
            self._cache = self._after
            return
        token, i = before
        self._cache = _run_again(
            self._f, self._laid_out, self._cache, token, i, drafts, running, counts
        )


@partial(jax.jit, static_argnames=("f", "count"))
def _propose(f, params, cache, state: State, running, sampling, count):
    """The cache of each row after `count` drafts, and these, [B, count]."""

    def row(params, sampling, cache, token, i, key, running):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")

        def step(carry, _):
            cache, token, i = carry
            cache, logits = f(params, cache, token, jnp.where(running, i, -1))
            token, _ = sample(jax.random.fold_in(key, i), logits, sampling)
            return (cache, token, i + 1), token

        # One step more than there are drafts writes the cell of the last one.
        (cache, *_), drafts = jax.lax.scan(step, (cache, token, i), length=count + 1)
        return cache, drafts[:-1]

    own = cache, state.token, state.i, state.key, running
    cache, drafts = _each_row(row, (params, sampling), own)
    return cache, constrain(drafts)


@partial(jax.jit, static_argnames="f", donate_argnames="cache")
def _run_again(f, params, cache, token, i, drafts, running, counts):
    """The cache of each row after the tokens that count."""

    def row(params, cache, token, i, drafts, running, count):
        n = jnp.arange(len(drafts) + 1, dtype=jnp.int32)
        positions = jnp.where(running & (n < count), i + n, -1)
        return parallel(f, params, cache, jnp.concatenate([token[None], drafts]), positions)[0]

    return _each_row(row, (params,), (cache, token, i, drafts, running, counts))
