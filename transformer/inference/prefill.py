"""Prompts run in chunks, before anything is drawn; what several have in common runs once."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.tracing.target import platform
from transformer.axes import over_sequences
from transformer.config import Config
from transformer.memory.cache import Cache
from transformer.modes.schedule import parallel
from transformer.program.init import init_cache
from transformer.program.params import Params


def chunk_size() -> int:
    """How many tokens of a prompt run at once.

    Every chunk reads all weights. On a CPU the products of 64 tokens take longer than that; 512
    keep more of a GPU or TPU at work, and fit the smallest cache of `generate`.
    """
    return 64 if platform() == "cpu" else 512


class Prefill:
    """Makes the caches of prompts that are known beforehand.

    Cells once written never change, so what all prompts begin with, in whole chunks, runs once, and
    so do prompts that are equal.

    Attributes:
      positions_run: how many positions have been run so far, without padding.
    """

    def __init__(
        self,
        config: Config,
        f: Callable,
        params: Params,
        capacity: int,
        prompts: Sequence[np.ndarray],
    ):
        """Runs what all prompts begin with.

        Args:
          config: makes the cache.
          f, params: the program and its parameters.
          capacity: cells of each row, not fewer than `chunk_size()`.
          prompts: all that will be asked for, token ids of each, int32 [T].
        """
        self._f, self._params, self._capacity = f, params, capacity
        self._cache, self._chunks, self.positions_run = empty_row(config, capacity), 0, 0
        self._size = chunk_size()
        if len(prompts) > 1:
            length = _in_common(prompts) // self._size * self._size
            self._cache = self._run(self._cache, prompts[:1], length)
            self._chunks = length // self._size

    def __call__(self, prompts: Sequence[np.ndarray]) -> Cache:
        """The cache of each prompt after all of its tokens but the last, with an axis of rows."""
        places = {}
        index = [places.setdefault(prompt.tobytes(), len(places)) for prompt in prompts]
        different = [prompts[index.index(n)] for n in range(len(places))]
        cache = _take(self._cache, np.zeros(len(places), np.int32))
        cache = self._run(cache, different, max(map(len, prompts)) - 1)
        return cache if len(places) == len(prompts) else _take(cache, np.array(index, np.int32))

    def _run(self, cache, prompts, length):
        """Runs the first tokens of each prompt, at most `length` and all but the last."""
        room = -(-self._capacity // self._size) * self._size
        tokens = np.stack([np.pad(x, (0, room - len(x))) for x in prompts])
        ends = np.array([min(len(x) - 1, length) for x in prompts], np.int32)
        self.positions_run += int(np.maximum(ends - self._chunks * self._size, 0).sum())
        chunks = np.int32([self._chunks, -(-length // self._size)])
        return run_chunks(self._f, self._params, cache, tokens, ends, chunks, self._size)


def _in_common(prompts):
    """How many tokens all prompts begin with, the last of each left out."""
    shortest = min(map(len, prompts)) - 1
    table = np.stack([prompt[:shortest] for prompt in prompts])
    differ = (table != table[0]).any(0)
    return int(differ.argmax()) if differ.any() else shortest


@partial(jax.jit, static_argnames=("config", "capacity"))
def empty_row(config, capacity) -> Cache:
    """An empty cache with an axis of one row."""
    return jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), init_cache(config, capacity))


@jax.jit
def _take(cache: Cache, rows) -> Cache:
    take = lambda cache, rows: jax.tree.map(lambda x: x[rows], cache)
    return over_sequences(take, len(rows), num_shared=1)(cache, rows)


@partial(jax.jit, static_argnames=("f", "size"), donate_argnames="cache")
def run_chunks(f, params, cache: Cache, tokens, ends, chunks, size) -> Cache:
    """Runs chunks of prompts.

    Args:
      cache: of B rows, after the chunks before.
      tokens: [B, T], where T is a multiple of `size`.
      ends: [B], how many tokens of each row there are to run in all.
      chunks: [2], the first chunk and the one behind the last.
      size: tokens of a chunk; static.
    """

    def chunk(params, n, cache, tokens, ends):
        positions = n * size + jnp.arange(size, dtype=jnp.int32)

        def row(cache, tokens, end):
            tokens = jax.lax.dynamic_slice(tokens, positions[:1], (size,))
            return parallel(f, params, cache, tokens, jnp.where(positions < end, positions, -1))

        return jax.vmap(row)(cache, tokens, ends)[0]  # the logits are never computed

    chunk = over_sequences(chunk, len(tokens), num_shared=2)
    advance = lambda n, cache: chunk(params, n, cache, tokens, ends)
    return jax.lax.fori_loop(chunks[0], chunks[1], advance, cache)
