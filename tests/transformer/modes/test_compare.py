"""The ways to run the same tokens agree, for every kind of transformer; and what tells if not."""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformer.config import Config, Delta, Latent
from transformer.modes import compare as module
from transformer.modes.compare import compare, ways

# All ways multiply the same float64 numbers in another order: a few roundings of 1e-16, more where
# a sum cancels. In float32 a sum that cancels is hard to tell from a mistake.
TOLERANCE = 1e-11

SIZES = {"vocab_size": 61, "max_length": 64, "num_layers": 2, "width": 32, "num_heads": 4}
DELTA = Delta(num_key_heads=2, num_value_heads=4, key_size=6, value_size=5)
LATENT = Config(**SIZES, layer_kinds="latent", latent=Latent(rank=12, rotary_size=4))
LATENT = LATENT.replace(num_layers=1)
HYBRID = Config(**SIZES, layer_kinds=("delta", "attention"), delta=DELTA, scan_layers=True)
SHARED = Config(**(SIZES | {"num_layers": 3}), window=(8, None, 8), num_shared_kv_layers=1)


@settings(max_examples=1)
@given(
    config=st.from_type(Config),
    way=st.sampled_from(
        ["chunks of 16", "chunks of 64", "batched", "larger capacity", "recompute"]
    ),
    length=st.sampled_from([2, 17, 40, 64]),
    seed=st.integers(0, 2**31 - 2),
)
@example(config=LATENT, way="sequential", length=40, seed=0)
@example(config=HYBRID, way="chunks of 16", length=40, seed=0)
@example(config=SHARED, way="chunks of 16", length=40, seed=0)
def test_every_way_to_run_agrees(random_params, config, way, length, seed):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length, dtype=np.int32)
    names = dict.fromkeys(["parallel", "sequential", way])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(np.float64), random_params(config, seed))
        rows = compare(config.replace(dtype="float64"), params, tokens, names=names)
    for row in rows:
        assert row.logit_difference <= TOLERANCE, row
        assert (row.gradient_difference or 0) <= TOLERANCE, row


@pytest.fixture
def small(random_params, rng):
    config = Config(**SIZES)
    return config, random_params(config), rng.integers(0, 61, 20, dtype=np.int32)


def test_the_parallel_mode_is_what_others_are_compared_with(small):
    [first, second] = compare(*small, names=["parallel", "chunks of 64"])
    assert (first.way, first.logit_difference, first.equal_bits) == ("parallel", 0, 1)
    assert first.gradient_difference == 0
    # 20 tokens in chunks of 64 are one chunk: the same program, the same bits.
    assert (second.logit_difference, second.equal_bits, second.gradient_difference) == (0, 1, 0)


def test_a_way_that_differs_is_seen(small, monkeypatch):
    """One logit of one token, by a thousandth of the largest; and its gradient."""
    config, params, tokens = small
    right = ways(config)

    def wrong(params, tokens):
        logits = right["parallel"](params, tokens)
        return logits.at[7, 3].add(1e-3 * jax.lax.stop_gradient(abs(logits).max()))

    monkeypatch.setattr(module, "ways", lambda *_: {"parallel": right["parallel"], "wrong": wrong})
    row = compare(config, params, tokens)[1]
    assert row.way == "wrong"
    assert row.logit_difference == pytest.approx(1e-3, rel=1e-2)  # of float32, beside others
    assert 0.9 < row.equal_bits < 1 and row.gradient_difference > 0


def test_recomputing_is_not_differentiated(small):
    assert compare(*small, names=["parallel", "recompute"])[1].gradient_difference is None
