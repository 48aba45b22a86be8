"""The scores that a model gives to tokens."""

import jax
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from transformer import Config, Model, init_cache, init_params, program, run, score
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.score import _scorer

CONFIG = Config(
    vocab_size=257, max_length=150, num_layers=2, width=16, num_heads=2, window=(8, None)
)


@pytest.fixture
def model(rng):
    params = init_params(CONFIG, jax.random.key(rng.integers(2**31)))
    return Model(CONFIG, params, byte_tokenizer())


def random_tokens(rng, length):
    return rng.integers(0, CONFIG.vocab_size, length)


def test_scores_are_the_sequential_modes_log_probabilities(rng, model):
    tokens = random_tokens(rng, 50)
    cache = init_cache(CONFIG, 50)
    _, logits = run(program(CONFIG), model.params, cache, tokens, chunk=1)
    logits = np.asarray(logits, np.float64)[:-1]
    expected = logits[np.arange(49), tokens[1:]] - np.asarray(logsumexp(logits, axis=-1))
    # Float32 sums in another order: a few rounding errors of logits of about 1.
    np.testing.assert_allclose(score(model, tokens), expected, atol=1e-5)


def test_a_score_depends_on_nothing_that_follows(rng, model):
    tokens = random_tokens(rng, 150)
    whole = score(model, tokens)
    assert whole.shape == (149,) and whole.dtype == np.float32
    for length in (1, 2, 64, 65, 149):
        part = score(model, tokens[:length])
        assert part.shape == (length - 1,)
        # As above: other shapes may sum in another order.
        np.testing.assert_allclose(part, whole[: length - 1], atol=1e-5)


def test_new_lengths_do_not_compile_anew(rng, model):
    for length in range(1, 151, 7):
        score(model, random_tokens(rng, length))
    assert _scorer(CONFIG, "fast")._cache_size() == 3  # padded to 64, 128 and 150


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one"),
        ([[1, 2]], r"\[1, 2\]"),
        ([1.0, 2.0], "float64"),
        ([0, 257], "token id 257 at 1 is outside of the vocabulary, 0 to 256"),
        ([-1], "token id -1 at 0"),
        ([0] * 151, r"151 tokens are more than the 150 positions .*max_length"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
        score(model, tokens)
