"""A program and a few random tokens for it, run in several ways."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.memory.cache import Cache
from transformer.modes.contract.tracing import Trace, equations
from transformer.modes.schedule import parallel

SEED, TOKENS = 0, 72  # more than a tile of most kernels, and not whole tiles

# No optimisation by LLVM, and all of a program as one piece.
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}


class Outcome(NamedTuple):
    """What a way to run the tokens gives, as lists of arrays; empty where it was not looked at."""

    logits: list = []  # noqa: RUF012
    cache: list = []  # noqa: RUF012
    gradients: list = []  # noqa: RUF012


class Trial:
    """A program, what it needs to run, and T random tokens.

    Attributes:
      f, params, cache: as in `check_contract`.
      tokens, others: [T] int32; they differ in each place, where there is more than one token id.
      i: [T] int32, the positions from 0.
      random: where more numbers are drawn from.
    """

    def __init__(self, f: Callable, params, cache: Cache, vocab_size: int):
        self.f, self.params, self.cache = f, params, cache
        self.random = np.random.default_rng(SEED)
        length = min(TOKENS, cache.capacity)
        self.tokens = self.random.integers(0, vocab_size, length, dtype=np.int32)
        steps = self.random.integers(1, max(2, vocab_size), length, dtype=np.int32)
        self.others = (self.tokens + steps) % vocab_size
        self.i = np.arange(length, dtype=np.int32)
        self._weights = self.random.normal(size=(length, vocab_size))
        one = lambda params, cache, tokens, i: parallel(f, params, cache, tokens, i)
        packed = lambda params, cache, tokens, i: parallel(f, params, cache, tokens, i, packed=True)
        self._parallel, self._packed, self._step = map(compiled, (one, packed, f))
        self._batch = compiled(jax.vmap(one, (None, 0, 0, 0)))

    def parallel(self, cache=None, tokens=None, i=None):
        """All tokens at once; what is None is that of the trial: -> (cache, logits [T, V])."""
        given = zip((cache, tokens, i), (self.cache, self.tokens, self.i), strict=True)
        cache, logits = self._parallel(self.params, *(y if x is None else x for x, y in given))
        return cache, np.asarray(logits)

    def packed(self, i):
        """All tokens at once, with positions that begin again at 0: -> (cache, logits [T, V])."""
        cache, logits = self._packed(self.params, self.cache, self.tokens, i)
        return cache, np.asarray(logits)

    def batch(self, caches, tokens, i):
        """Several sequences at once: -> (caches, logits [B, T, V])."""
        caches, logits = self._batch(self.params, caches, tokens, i)
        return caches, np.asarray(logits)

    def sequential(self):
        """Token after token, as in generation: -> (cache, logits)."""
        cache, every = self.cache, []
        for token, i in zip(self.tokens, self.i, strict=True):
            cache, logits = self._step(self.params, cache, token, i)
            every.append(np.asarray(logits))
        return cache, np.stack(every)

    def chunks(self, size: int, cache=None):
        """Chunk after chunk, the last one filled up with padding: -> (cache, logits)."""
        cache, every = self.cache if cache is None else cache, []
        for start in range(0, len(self.i), size):
            tokens, i = self.tokens[start : start + size], self.i[start : start + size]
            missing = size - len(i)
            tokens, i = np.pad(tokens, (0, missing)), np.pad(i, (0, missing), constant_values=-1)
            cache, logits = self._parallel(self.params, cache, tokens, i)
            every.append(np.asarray(logits)[: size - missing])
        return cache, np.concatenate(every)

    def run(self, way: Callable, gradients: bool) -> Callable:
        """A way to run the tokens, way(params, cache, tokens), compiled: -> (params -> Outcome)."""

        def loss(moving, fixed, cache, tokens):
            cache, logits = way(_joined(moving, fixed), cache, tokens)
            return (logits * self._weights.astype(logits.dtype)).sum(), (cache, logits)

        both = compiled(jax.grad(loss, has_aux=True) if gradients else loss)

        def outcome(params):
            first, (cache, logits) = both(*_separated(params), self.cache, self.tokens)
            leaves = lambda tree: list(map(np.asarray, jax.tree.leaves(tree)))
            return Outcome([np.asarray(logits)], leaves(cache), leaves(first) if gradients else [])

        return outcome

    def filled(self, number: float | None = None) -> Cache:
        """The cache with garbage in its cells, or with one number where they are floating."""

        def fill(x):
            if not is_floating(x):
                return x if number is not None else jnp.ones_like(x)
            if number is not None:
                return jnp.full_like(x, number)
            scale = min(1e4, float(jnp.finfo(x.dtype).max) / 16)
            return jnp.asarray(scale * self.random.uniform(-1, 1, x.shape), x.dtype)

        return jax.tree.map(fill, self.cache)

    def rounded(self, rounding: float):
        """The parameters, each changed by at most one rounding."""

        def change(x):
            relative = self.random.uniform(-rounding, rounding, np.shape(x))
            return (x * (1 + relative)).astype(x.dtype) if is_floating(x) else x

        return jax.tree.map(lambda x: change(jnp.asarray(x)), self.params)


def compiled(f: Callable) -> Callable:
    """jax.jit, as fast as it can be had: most functions here run once."""
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(f, compiler_options=_QUICKLY if on_cpu else None)


def is_floating(x) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def rounding(once: Trace) -> float:
    """The unit of the least precise numbers that a program computes with."""
    kinds = {x.aval.dtype for eqn in equations(once.jaxpr) for x in eqn.outvars if _typed(x)}
    floating = [kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
    return max((float(jnp.finfo(kind).eps) for kind in floating), default=0.0)


def _typed(variable):
    return hasattr(variable.aval, "dtype")


def _separated(params):
    """Parameters that have gradients, and the others, with None in place of each other."""
    moving = jax.tree.map(lambda x: x if is_floating(x) else None, params)
    return moving, jax.tree.map(lambda x: None if is_floating(x) else x, params)


def _joined(moving, fixed):
    """What `_separated` has separated."""
    either = lambda x, y: y if x is None else x
    return jax.tree.map(either, moving, fixed, is_leaf=lambda x: x is None)
