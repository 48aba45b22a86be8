"""Conversations with a model: each turn runs what is new, and keeps the cells of what was said."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np

from transformer.config import Config
from transformer.data.chat import render
from transformer.inference.adjust import Written
from transformer.inference.ahead import Ahead
from transformer.inference.completion import Completion, Writer
from transformer.inference.decode import State, capacity_for, decode, stop_ids
from transformer.inference.options import Options
from transformer.inference.prefill import chunk_size, empty_row
from transformer.inference.prepare import cast_params, lay_out_params
from transformer.inference.prompts import prompt_keys, stop_conditions
from transformer.modes.schedule import parallel
from transformer.program.fit import check_params
from transformer.program.params import Params
from transformer.program.program import Program, program

_FIRST_CAPACITY = 2048  # cells; a conversation that outgrows them runs once again, in twice as many


class Conversation:
    """Messages, and the cells of their tokens.

    Attributes:
      messages: so far, each with a "role" and a "content".
      positions_run: how many positions of messages have been run so far, which shows that none
        runs again.
    """

    def __init__(
        self, model, *, system: str | None = None, steps: "Steps | None" = None, **options
    ):
        """Begins a conversation.

        Args:
          model: config, params and a tokenizer with a chat template.
          system: what the model is told at the start; None: what its template says.
          steps: what was compiled for these options while the model was read; None: nothing.
          **options: the fields of `transformer.inference.options.Options`, of which max_new_tokens
            must be given, for each reply, of which there is one: num_samples, batch_size and
            top_logprobs change nothing.

        Raises:
          ValueError: an option is out of range, or the model has no tokenizer or chat template.
        """
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer, and a conversation is text.")
        check_params(model.config, model.params)
        self._options = Options(**options)
        self._model, self._tokenizer = model, model.tokenizer
        self._stops = stop_conditions(model.config, model.tokenizer, self._options.stop)
        self._program = _program(model.config, self._options)
        self._params = _prepared(self._program, model.config, model.params)
        self._steps = steps or Steps(**options)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.positions_run = 0
        self._text, self._tokens = "", []  # what has been said, of which all but the last is cells
        self._cache, self._capacity = None, 0

    def reply(self, text: str) -> Iterator[str]:
        """Says something, and returns the reply piece by piece, in whole characters.

        Args:
          text: what the user says.

        Raises:
          transformer.data.chat.TemplateError: the model's template refuses the messages.
          ValueError: the conversation is longer than the model's max_length.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        text = render(self._tokenizer, messages)
        tokens = self._wanted(text)
        self._require_room(len(tokens) + self._options.max_new_tokens)
        self._run(tokens)
        writer = Writer(self._tokenizer, *self._stops, self._options.max_new_tokens)
        yield from self._draw(tokens, writer)
        completion = writer.completion
        self.messages = [*messages, {"role": "assistant", "content": completion.text}]
        self._tokens = [*tokens, *completion.tokens]
        self._text = text + completion.text + self._end(completion)

    def _wanted(self, text):
        """The tokens of a text; those that were drawn stay, however the text would be cut now."""
        if self._text and text.startswith(self._text):
            return self._tokens + self._tokenizer.encode(text[len(self._text) :], special=True)
        return self._tokenizer.encode(text, special=True)

    def _end(self, completion: Completion):
        """What stands in the text for the token that ended a reply."""
        last = completion.tokens[-1]
        return self._tokenizer.token(last) if last in self._stops[1] else ""

    def _require_room(self, length):
        """Makes the cache larger where it is too small; what is in it is lost then."""
        if length > self._model.config.max_length:
            raise ValueError(
                f"the conversation is {length} tokens long with its next reply, more than the "
                f"model's max_length={self._model.config.max_length}; begin a new one."
            )
        if length > self._capacity:
            self._capacity = capacity_for(max(length, 2 * self._capacity, _FIRST_CAPACITY))
            self._cache = None

    def _run(self, tokens):
        """Runs all tokens but the last that are not in the cells yet."""
        done = max(len(self._tokens) - 1, 0) if self._cache is not None else 0
        if tokens[:done] != self._tokens[:done]:  # the template changed what was said
            done, self._cache = 0, None
        if self._cache is None:
            self._cache = empty_row(self._model.config, self._capacity)
        size = chunk_size()
        for start in range(done, len(tokens) - 1, size):
            chunk = tokens[start : min(start + size, len(tokens) - 1)]
            padding = size - len(chunk)
            positions = np.pad(start + np.arange(len(chunk)), (0, padding), constant_values=-1)
            ids = np.pad(chunk, (0, padding))
            self._cache = self._steps.read(
                self._program, self._params, self._cache, np.int32(ids), np.int32(positions)
            )
            self.positions_run += len(chunk)

    def _draw(self, tokens, writer):
        """Draws the reply, one token at a time."""
        state, how = _begin(
            self._model.config,
            self._options,
            self._cache,
            self._capacity,
            tokens,
            self._tokenizer.vocab_size,
            self._stops[1],
        )
        while writer.completion is None:
            state, _, drawn = self._steps.draw(self._program, self._params, state, *how)
            yield writer.push(jax.tree.map(np.asarray, drawn).at(0, 0))
        self._cache = state.cache


def _begin(config, options, cache, capacity, tokens, vocab_size, stops):
    """What `decode` takes to draw one token of one row: its state, and what follows that."""
    prompt = np.array(tokens, np.int32)
    adjust, written = options.adjustments(config.vocab_size), None
    if adjust.need_written:
        written = Written.begin(prompt, capacity, config.vocab_size)
        written = jax.tree.map(lambda x: x[None], written)
    last, keys = np.int32([len(prompt) - 1]), prompt_keys([prompt], options.seed)
    state = State(cache, prompt[-1:], last, keys, written)
    sampling, running, one = options.sampling(vocab_size), np.ones(1, bool), np.int32(1)
    return state, (running, sampling, stop_ids(stops), one, one, adjust, options.wanted)


class Steps:
    """What a conversation runs, which may be compiled while its model is read.

    Attributes:
      read: runs a chunk of what is said.
      draw: draws a token of a reply.
    """

    def __init__(self, *, keep: bool = False, **options):
        """Compiles nothing yet.

        Args:
          keep: as in `Ahead.compile`.
          **options: those of the conversation.
        """
        self._options, self._keep = Options(**options), keep
        self.read, self.draw = Ahead(_read, [0], [2]), Ahead(decode, [0, 9], [2])

    def compile(self, config: Config, params: Params) -> None:
        """Compiles what runs for as long as the conversation fits its first cells.

        `load` takes it as `prepare` and calls it while it reads: the first reply begins sooner.

        Args:
          config, params: those of the model; of arrays the shapes are enough.
        """
        f = _program(config, self._options)
        params = jax.eval_shape(partial(_prepared, f, config), params)
        capacity, ids = capacity_for(_FIRST_CAPACITY), np.zeros(chunk_size(), np.int32)
        cache = jax.eval_shape(partial(empty_row, config, capacity))
        state, how = _begin(config, self._options, cache, capacity, [0], None, ())
        keep = self._keep and isinstance(f, Program)
        with ThreadPoolExecutor(1) as pool:  # what was compiled before is read outside of Python
            reading = pool.submit(self.read.compile, f, params, cache, ids, ids, keep=keep)
            self.draw.compile(f, params, state, *how, keep=keep)
            reading.result()


def _program(config, options):
    return options.program or program(
        config, numerics=options.numerics, attention=options.attention
    )


def _prepared(f, config, params):
    """As a loop of steps takes them, and chunks as well, which are short."""
    return lay_out_params(f, cast_params(config, params))


@partial(jax.jit, static_argnames="f", donate_argnames="cache")
def _read(f, params, cache, tokens, positions):
    """The cache of one row after some tokens [T] at positions [T], -1 where there is none."""
    return jax.vmap(lambda cache: parallel(f, params, cache, tokens, positions)[0])(cache)
