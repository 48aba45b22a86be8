"""The loss: a mean of cross entropies over the logits of the parallel mode."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.axes import RULES
from transformer.data.batches import Batch
from transformer.memory.cache import Cache
from transformer.modes.schedule import parallel
from transformer.numerics.numerics import numerics_of
from transformer.program.init import init_cache


def compute_logits(f, params, cache, batch):
    """Logits [B, T, V]: each row in the parallel mode, from the same empty cache."""
    if batch.positions is None:
        positions = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
        row = lambda tokens: parallel(f, params, cache, tokens, positions)[1]
        return jax.vmap(row, spmd_axis_name=RULES["rows"])(batch.tokens)
    row = lambda tokens, positions: parallel(f, params, cache, tokens, positions, packed=True)[1]
    return jax.vmap(row, spmd_axis_name=RULES["rows"])(batch.tokens, batch.positions)


def loss(
    f: Callable,
    params,
    cache: Cache,
    batch: Batch,
    z_loss: float = 0.0,
    total_weight: jax.Array | None = None,
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

    Returns:
      (mean of nll + z_loss * lse^2, mean of nll), in nats.
    """
    if total_weight is None:
        total_weight = jnp.sum(batch.weights)
    total_weight = jnp.where(total_weight == 0, 1, total_weight)  # no target counts: 0, not nan
    logits = compute_logits(f, params, cache, batch)
    nll, lse = numerics_of(f).cross_entropy(logits, batch.targets)
    mean = lambda x: jnp.sum(x * batch.weights) / total_weight
    nll_mean = mean(nll)
    return nll_mean + z_loss * mean(jnp.square(lse)) if z_loss else nll_mean, nll_mean


def row_cache(config, batch):
    """An empty cache for one row of a batch."""
    length = batch.tokens.shape[1]
    if length > config.max_length:
        raise ValueError(f"rows of {length} tokens exceed the model's {config.max_length=}.")
    return init_cache(config, length)
