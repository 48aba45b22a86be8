"""Evaluation: the loss per target and per byte of text."""

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from transformer.config import Config
from transformer.data.batches import Batch
from transformer.program.params import Params
from transformer.program.program import program
from transformer.training.loss import cross_entropies, row_cache


def make_eval_step(
    config: Config, attention: str = "auto", numerics: str = "fast", loss_parts: int = 1
) -> Callable[[Params, Batch], jax.Array]:
    """Makes a compiled `eval_step(params, batch) -> nll [B, T]` in nats, weights not applied.

    `loss_parts` is that of `make_train_step`.

    Raises:
      ValueError: while tracing, T exceeds config.max_length, or is not a multiple of loss_parts.
    """
    f = program(config, numerics=numerics, attention=attention)

    @jax.jit
    def eval_step(params, batch):
        cache = row_cache(config, batch)
        return cross_entropies(f, params, cache, batch, loss_parts)[0]

    return eval_step


def evaluate(
    eval_step: Callable, params, batches: Iterable[Batch], byte_lengths: np.ndarray
) -> dict[str, float]:
    """Loss over batches, per target and per byte of text.

    Args:
      eval_step: (params, batch) -> nll [B, T] in nats.
      params: what to evaluate.
      batches: each target of the text once; padding has weight 0.
      byte_lengths: [V] bytes that each token stands for. The end of a document stands for 0 bytes,
        and its nats count.

    Returns:
      validation_loss, nats per target; validation_bits_per_byte.

    Raises:
      ValueError: no target in batches stands for any text.
    """
    nats = targets = size = 0.0
    for batch in batches:
        weights = np.asarray(batch.weights, np.float64)
        nats += float(np.sum(np.asarray(eval_step(params, batch), np.float64) * weights))
        targets += float(np.sum(weights))
        size += float(np.sum(np.asarray(byte_lengths)[np.asarray(batch.targets)] * weights))
    if not size:
        raise ValueError("no target to evaluate stands for any text; give at least one batch.")
    return {
        "validation_loss": nats / targets,
        "validation_bits_per_byte": nats / math.log(2) / size,
    }
