"""Evaluation: what counts, and how much."""

import numpy as np
import pytest

from transformer.config import Config
from transformer.training import evaluation

V, T = 29, 24


def test_evaluate_weighs_targets_and_counts_bytes(random_batch, rng):
    batches = [random_batch(rng, 2), random_batch(rng, 3)]
    nlls = [rng.random(batch.tokens.shape).astype(np.float32) for batch in batches]
    byte_lengths = rng.integers(0, 5, V)
    by_first = {batch.tokens.shape: nll for batch, nll in zip(batches, nlls, strict=True)}
    eval_step = lambda params, batch: by_first[batch.tokens.shape]
    result = evaluation.evaluate(eval_step, None, iter(batches), byte_lengths)
    flat = lambda xs: np.concatenate([np.float64(x).ravel() for x in xs])
    weights, nats = flat(batch.weights for batch in batches), flat(nlls)
    size = byte_lengths[np.int32(flat(batch.targets for batch in batches))]
    assert result == {
        "validation_loss": pytest.approx(weights @ nats / weights.sum()),
        "validation_bits_per_byte": pytest.approx(weights @ nats / np.log(2) / (weights @ size)),
    }


def test_evaluating_nothing_is_an_error():
    with pytest.raises(ValueError, match="give at least one batch"):
        evaluation.evaluate(None, None, [], np.ones(V))


def test_rows_longer_than_the_model_are_refused(random_batch, rng):
    config = Config(vocab_size=V, max_length=T, num_layers=1, width=8, num_heads=1)
    with pytest.raises(ValueError, match=f"rows of {2 * T} tokens exceed .*max_length={T}"):
        evaluation.make_eval_step(config)(None, random_batch(rng, 2, 2 * T))
