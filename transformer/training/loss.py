"""The loss: a mean of cross entropies over the logits of the parallel mode."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from transformer.axes import RULES, over_parts
from transformer.data.batches import Batch
from transformer.memory.cache import Cache
from transformer.modes.schedule import parallel
from transformer.numerics.numerics import numerics_of
from transformer.program.init import init_cache
from transformer.program.program import Program, unembed


def compute_logits(f, params, cache, batch):
    """Logits [B, T, V], or what else f returns of a token: each row in the parallel mode, from the
    same empty cache.
    """
    if batch.positions is None:
        positions = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
        row = lambda tokens: parallel(f, params, cache, tokens, positions)[1]
        return jax.vmap(row, spmd_axis_name=RULES["rows"])(batch.tokens)
    row = lambda tokens, positions: parallel(f, params, cache, tokens, positions, packed=True)[1]
    return jax.vmap(row, spmd_axis_name=RULES["rows"])(batch.tokens, batch.positions)


def cross_entropies(f, params, cache, batch, parts: int = 1):
    """Cross entropy and log-sum-exp of every target, both [B, T] in nats.

    Args:
      f, params, cache, batch: as in `loss`.
      parts: how many parts of each row have their logits made one after another, forwards and
        again backwards, so that only [B, T / parts, V] of them are there at once; it divides T.

    Raises:
      ValueError: T is not a multiple of parts, or f is not a program of a config, of which alone
        it is known where the logits begin.
    """
    if parts == 1:
        return numerics_of(f).cross_entropy(compute_logits(f, params, cache, batch), batch.targets)
    if not isinstance(f, Program):
        raise ValueError(
            f"loss_parts={parts} goes with the program of a config, not with {f}; use loss_parts=1."
        )
    B, T = batch.targets.shape
    if T % parts:
        raise ValueError(
            f"rows of {T} tokens cannot be cut into loss_parts={parts} equal parts; use a number "
            "of parts that divides it."
        )
    hidden = compute_logits(f.hidden, params, cache, batch)

    def in_parts(params, hidden, targets):
        @jax.checkpoint
        def part(hidden, targets):
            logits = jax.vmap(jax.vmap(partial(unembed, f, params)))(hidden)
            return f.numerics.cross_entropy(logits, targets)

        split = partial(_split_tokens, math.gcd(parts, targets.shape[1]))
        results = jax.lax.map(lambda of: part(*of), (split(hidden), split(targets)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(targets.shape), results)

    # So a matrix that is split over devices is gathered once, and its gradient added up once.
    in_parts = over_parts(in_parts, num_shared=1, rows=B, tokens=T)
    embedding = params.embedding if params.output is None else None
    end = params.replace(layers=(), positions=None, embedding=embedding)
    return in_parts(end, hidden, batch.targets)


def _split_tokens(parts, x):
    """[B, T, ...] -> [parts, B, T / parts, ...], each part taking every `parts`-th token.

    So where the compiler splits the tokens of rows over devices, none moves.
    """
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, T // parts, parts, *x.shape[2:]), 2, 0)


def loss(
    f: Callable,
    params,
    cache: Cache,
    batch: Batch,
    z_loss: float = 0.0,
    total_weight: jax.Array | None = None,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The objective of training, a mean over targets in proportion to their weights.

    Args:
      f, params: the program and its parameters.
      cache: an empty cache for one sequence, with room for T positions.
      batch: arrays [B, T]. positions None: every row is one document, without packing.
      z_loss: factor of the squared log-sum-exp that keeps logits near 0 (PaLM, arXiv:2204.02311,
        section 5).
      total_weight: what the sums are divided by; None: the sum of the batch's weights. A part of a
        larger batch takes that of the whole.
      parts: as in `cross_entropies`.

    Returns:
      (mean of nll + z_loss * lse^2, mean of nll), in nats.
    """
    if total_weight is None:
        total_weight = jnp.sum(batch.weights)
    total_weight = jnp.where(total_weight == 0, 1, total_weight)  # no target counts: 0, not nan
    nll, lse = cross_entropies(f, params, cache, batch, parts)
    mean = lambda x: jnp.sum(x * batch.weights) / total_weight
    nll_mean = mean(nll)
    return nll_mean + z_loss * mean(jnp.square(lse)) if z_loss else nll_mean, nll_mean


def row_cache(config, batch):
    """An empty cache for one row of a batch."""
    length = batch.tokens.shape[1]
    if length > config.max_length:
        raise ValueError(f"rows of {length} tokens exceed the model's {config.max_length=}.")
    return init_cache(config, length)
