"""The rows of a batch: sequences that run at once, and make room for others when they end."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from transformer.inference.adjust import Adjustments, Written
from transformer.inference.decode import State, capacity_for, decode, stop_ids
from transformer.inference.drawn import Drawn
from transformer.inference.options import Options
from transformer.inference.prefill import Prefill
from transformer.inference.prepare import cast_params, lay_out_params
from transformer.inference.prompts import prompt_keys


class Rows:
    """A batch of rows, each with a sequence; a sequence gets what it would get alone.

    Attributes:
      size: B, how many rows there are.
      state: of all rows.
      f, params, sampling, adjust, wanted: what `inference.decode.decode` takes.
      prompts: of all sequences. vocab_size: V of the config. capacity: cells of a row.
      steps_run: how many steps of decoding have been run so far.
    """

    def __init__(
        self,
        f: Callable,
        model,
        prompts: Sequence[np.ndarray],
        stop_tokens: set[int],
        options: Options,
        adjust: Adjustments,
    ):
        """Runs the prompts of the first sequences.

        Args:
          f: the program.
          model: as in `generate`.
          prompts: of all sequences, token ids of each, int32 [T].
          stop_tokens: ids at which a sequence ends.
          options: their batch_size is B, if there are so many sequences.
          adjust: what is done to logits.
        """
        config, tokenizer = model.config, model.tokenizer
        self.f, self.params = f, cast_params(config, model.params)
        self.prompts, self._keys = prompts, prompt_keys(prompts, options.seed)
        self.sampling = options.sampling(tokenizer.vocab_size if tokenizer else None)
        self.adjust, self.wanted = adjust, options.wanted
        self.vocab_size = config.vocab_size
        drafts = options.draft.tokens if options.draft else 0
        self.capacity = capacity_for(max(map(len, prompts)) + options.max_new_tokens + drafts)
        self.size = min(options.batch_size or len(prompts), len(prompts))
        self.steps_run = 0
        self._stops = stop_ids(stop_tokens)
        self._prefill = Prefill(config, f, self.params, self.capacity, prompts)
        self.state = self._begin(range(self.size))

    def put(self, row: int, n: int) -> None:
        """Gives a row to sequence n, whose prompt is run."""
        self.state = put_row(self.state, np.int32(row), self._begin([n]))

    def decode(self, running: np.ndarray, steps: int, least: int) -> Iterator[tuple[int, Drawn]]:
        """Draws tokens of the running rows [B]: a row's number and what it drew, in arrays.

        Arguments are as in `inference.decode.decode`.
        What a row draws after the token that ends it has no meaning.
        """
        self.state, n, drawn = decode(
            self.f,
            self.laid_out,
            self.state,
            running,
            self.sampling,
            self._stops,
            np.int32(steps),
            np.int32(least),
            self.adjust,
            self.wanted,
        )
        n = int(n)
        self.steps_run += n
        drawn = jax.tree.map(np.asarray, drawn)
        rows = np.flatnonzero(running).tolist()
        for step in range(n):
            yield from ((row, drawn.at(step, row)) for row in rows)

    @functools.cached_property
    def laid_out(self):
        """The parameters as steps of few tokens take them."""
        return lay_out_params(self.f, self.params)

    def _begin(self, sequences):
        """The state of sequences whose prompts have been run."""
        prompts = [self.prompts[n] for n in sequences]
        written = None
        if self.adjust.need_written:
            begin = partial(Written.begin, capacity=self.capacity, vocab_size=self.vocab_size)
            written = jax.tree.map(lambda *x: np.stack(x), *map(begin, prompts))
        return State(
            cache=self._prefill(prompts),
            token=np.array([prompt[-1] for prompt in prompts], np.int32),
            i=np.array([len(prompt) - 1 for prompt in prompts], np.int32),
            key=self._keys[list(sequences)],
            written=written,
        )


@partial(jax.jit, donate_argnames="all_rows")
def put_row(all_rows, row, one):
    """A tree of arrays [B, ...] with those of a tree [1, ...] in the place of `row`."""
    put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y[0], row, 0)
    return jax.tree.map(put, all_rows, one)
