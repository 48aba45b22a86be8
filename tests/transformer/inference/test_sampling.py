"""Filters against plain numpy, draws against their probabilities, and what compiles again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.inference import sampling
from transformer.inference.sampling import Sampling, sample

V = 300

few = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
jitted = {
    name: jax.jit(getattr(sampling, name))
    for name in (
        "keep_top_k",
        "keep_top_p",
        "keep_min_p",
        "keep_below",
        "warp",
        "sample",
        "likeliest",
    )
}


def random_logits(seed, ties):
    """Logits of a random spread; with ties, of only a few values, both zeros among them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.uniform(0.1, 8), V)
    return (np.round(logits) if ties else logits).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def kept(name, logits, parameter):
    """Which tokens a filter keeps; those keep their logits."""
    filtered = np.asarray(jitted[name](logits, parameter))
    mask = filtered > -np.inf
    np.testing.assert_array_equal(filtered[mask], logits[mask])
    return mask


@few
@given(seeds, st.sampled_from([1, 255, 256, 257, V, 1000]), st.sampled_from([0, 1, 20]))
def test_the_likeliest_is_the_first_of_the_largest(seed, size, num_nan):
    """Of logits with ties; where some are nan, the first of those, as for argmax."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, 2, size)).astype(np.float32)
    logits[rng.integers(0, size, size // 2)] = -np.inf
    logits[rng.integers(0, size, num_nan)] = np.nan
    assert jitted["likeliest"](logits) == np.argmax(logits)


@few
@given(seeds, st.booleans(), st.integers(1, V + 50))
def test_top_k_keeps_the_k_most_likely_and_ties(seed, ties, k):
    logits = random_logits(seed, ties)
    threshold = np.sort(logits)[::-1][min(k, V) - 1]
    np.testing.assert_array_equal(kept("keep_top_k", logits, np.int32(k)), logits >= threshold)


@few
@given(seeds, st.booleans(), st.floats(1e-6, 1, exclude_min=True))
def test_top_p_keeps_the_fewest_tokens_that_hold_p(seed, ties, p):
    logits = random_logits(seed, ties)
    mask, probabilities = kept("keep_top_p", logits, np.float32(p)), softmax(logits)
    least = logits[mask].min()
    np.testing.assert_array_equal(mask, logits >= least)
    # Sums of 300 float32 numbers are exact to about 1e-6.
    assert probabilities[mask].sum() >= p - 2e-6
    if p < 1 - 1e-6:
        assert probabilities[logits > least].sum() < p + 2e-6


@few
@given(seeds, st.booleans(), st.floats(0, 1, width=32))
def test_min_p_keeps_tokens_near_the_most_likely(seed, ties, p):
    logits = random_logits(seed, ties)
    probabilities = softmax(logits)
    mask, ratio = kept("keep_min_p", logits, np.float32(p)), probabilities / probabilities.max()
    # float32 logits up to 30 place the border to within 1e-5 of itself.
    assert mask[ratio >= p * (1 + 1e-5)].all()
    assert not mask[ratio < p * (1 - 1e-5)].any()
    assert mask[logits.argmax()]


@few
@given(seeds, st.integers(1, V))
def test_ids_without_a_token_are_dropped(seed, size):
    mask = kept("keep_below", random_logits(seed, False), np.int32(size))
    np.testing.assert_array_equal(mask, np.arange(V) < size)


def test_filters_see_what_the_one_before_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    drawn = lambda **filters: np.isfinite(jitted["warp"](logits, Sampling.make(**filters))).sum()
    assert drawn(top_p=0.65) == 2
    assert drawn(top_k=2, top_p=0.55) == 1  # 0.4 of the 0.7 that are left is more than 0.55
    assert drawn(top_k=3, min_p=0.7) == 2
    assert drawn(temperature=0.5, min_p=0.7) == 1  # (3 / 4) ** 2 is less than 0.7


@few
@given(
    seeds,
    st.booleans(),
    st.floats(0, 2),
    st.none() | st.integers(1, V),
    st.none() | st.floats(1e-3, 1),
    st.none() | st.floats(0, 1),
)
def test_draws_what_filters_leave_and_scores_it_without_them(seed, ties, temperature, k, p, m):
    logits = random_logits(seed, ties)
    parameters = Sampling.make(temperature, k, p, m, vocab_size=V - 10)
    token, logprob = jitted["sample"](jax.random.key(seed), logits, parameters)
    usable = logits[: V - 10]
    if temperature < sampling.SMALLEST:
        assert token == usable.argmax()
    else:
        left = jitted["warp"](np.append(usable, [-np.inf] * 10).astype(np.float32), parameters)
        assert np.isfinite(left[token])
    # log-probabilities down to -60 in float32
    np.testing.assert_allclose(logprob, np.log(softmax(logits))[token], atol=2e-5)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6])
def test_low_temperatures_approach_the_most_likely_token(temperature):
    logits = random_logits(0, False) * 1e4
    token, logprob = jitted["sample"](jax.random.key(0), logits, Sampling.make(temperature))
    assert token == logits.argmax() and logprob == 0


def test_draws_follow_the_probabilities(rng):
    seed = int(rng.integers(2**32))
    logits = jnp.asarray(random_logits(seed, False) / 3)
    parameters, count = Sampling.make(temperature=1.5), 40_000
    keys = jax.random.split(jax.random.key(seed), count)
    draw = jax.jit(jax.vmap(lambda key: sample(key, logits, parameters)[0]))
    found = np.bincount(draw(keys), minlength=V)
    expected = count * softmax(np.asarray(logits) / 1.5)
    # 6 standard deviations: one run in a million has a token beyond; 6 more for the rare ones.
    assert (abs(found - expected) <= 6 * np.sqrt(expected) + 6).all(), seed


def test_parameters_are_data_and_unused_filters_are_skipped_in_a_batch():
    batch = jax.jit(jax.vmap(sample, (0, 0, None)))
    keys, logits = jax.random.split(jax.random.key(0), 4), jnp.zeros((4, V))
    for parameters in (Sampling.make(0), Sampling.make(), Sampling.make(0.7, 5, 0.9, 0.1, 250)):
        batch(keys, logits, parameters)
    assert batch._cache_size() == 1
    # `vmap` would make selects, whose branches both run, of conditions that it maps.
    text = batch.lower(keys, logits, Sampling.make()).as_text()
    assert text.count("stablehlo.case") + text.count("stablehlo.if") == 3


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"temperature": "1"},
        {"top_k": 2.5},
        {"top_k": float("nan")},
        {"top_p": "a"},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"vocab_size": 0},
    ],
)
def test_parameters_out_of_range_are_refused(parameters):
    [name] = parameters
    with pytest.raises((ValueError, TypeError), match=f"^{name}="):
        Sampling.make(**parameters)
