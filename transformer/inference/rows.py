"""The rows of a batch: sequences that run at once, and make room for others when they end."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from transformer.inference.adjust import Adjustments, Written
from transformer.inference.decode import State, capacity_for, cast_params, decode, stop_ids
from transformer.inference.options import Options
from transformer.inference.prefill import Prefill
from transformer.inference.prompts import prompt_keys

# The tokens of a step, their logprobs, and the most likely ids of each row with theirs.
Step = tuple[np.ndarray, np.ndarray, list[dict[int, float]]]


class Rows:
    """A batch of rows, each with a sequence; a sequence gets what it would get alone.

    Attributes:
      size: B, how many rows there are.
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
        self._f, self._params = f, cast_params(config, model.params)
        self._prompts, self._keys = prompts, prompt_keys(prompts, options.seed)
        self._stops = stop_ids(stop_tokens)
        self._sampling = options.sampling(tokenizer.vocab_size if tokenizer else None)
        self._adjust, self._num_top = adjust, options.top_logprobs
        self._vocab_size = config.vocab_size
        self._capacity = capacity_for(max(map(len, prompts)) + options.max_new_tokens)
        self._prefill = Prefill(config, f, self._params, self._capacity, prompts)
        self.size = min(options.batch_size or len(prompts), len(prompts))
        self.steps_run = 0
        self._state = self._begin(range(self.size))

    def put(self, row: int, n: int) -> None:
        """Gives a row to sequence n, whose prompt is run."""
        self._state = _put(self._state, np.int32(row), self._begin([n]))

    def decode(self, running: np.ndarray, steps: int, least: int) -> Iterator[Step]:
        """Draws tokens of the running rows [B]; arguments as in `inference.decode.decode`."""
        self._state, n, *drawn = decode(
            self._f,
            self._params,
            self._state,
            running,
            self._sampling,
            self._stops,
            np.int32(steps),
            np.int32(least),
            self._adjust,
            self._num_top,
        )
        n = int(n)
        self.steps_run += n
        for tokens, logprobs, *top in zip(*(np.asarray(x)[:n] for x in drawn), strict=True):
            yield tokens, logprobs, _pairs(*top) if top else [{}] * self.size

    def _begin(self, sequences):
        """The state of sequences whose prompts have been run."""
        prompts = [self._prompts[n] for n in sequences]
        written = None
        if self._adjust.need_written:
            begin = partial(Written.begin, capacity=self._capacity, vocab_size=self._vocab_size)
            written = jax.tree.map(lambda *x: np.stack(x), *map(begin, prompts))
        return State(
            cache=self._prefill(prompts),
            token=np.array([prompt[-1] for prompt in prompts], np.int32),
            i=np.array([len(prompt) - 1 for prompt in prompts], np.int32),
            key=self._keys[list(sequences)],
            written=written,
        )


@partial(jax.jit, donate_argnames="state")
def _put(state: State, row, one: State) -> State:
    """The state of all rows with that of a single one in the place of `row`."""
    put = lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x[0], row, 0)
    return jax.tree.map(put, state, one)


def _pairs(ids, logprobs):
    """For each row a dict, the likeliest first."""
    ids, logprobs = ids.tolist(), logprobs.tolist()
    return [dict(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
