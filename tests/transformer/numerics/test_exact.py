"""Exact numerics: a token's logits and cells have the same bits however it runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer import Config, init_cache, program, run

SIZES = {"vocab_size": 90, "max_length": 64, "num_layers": 2, "width": 32, "num_heads": 4}
LLAMA = Config(**SIZES, num_kv_heads=2, feed_forward="swiglu", feed_forward_width=44)
GPT2 = Config(**SIZES, positions="learned", norm="layer", feed_forward="gelu", biases="all")
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
LENGTH = 40


def tokens_of(config):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, LENGTH), jnp.int32)


@partial(jax.jit, static_argnames=("config", "capacity", "chunk"))
def outcome(config, params, tokens, capacity=LENGTH, chunk=None):
    """The cells that the tokens wrote, and their logits."""
    f = program(config, numerics="exact")
    cache, logits = run(f, params, init_cache(config, capacity), tokens, chunk=chunk)
    return [x[..., :LENGTH, :] for x in jax.tree.leaves(cache)], logits


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@given(st.sampled_from(list(CONFIGS)), st.integers(1, LENGTH), st.sampled_from([40, 64, 300]))
@settings(max_examples=6)
def test_any_chunk_and_any_capacity(random_params, name, chunk, capacity):
    config = CONFIGS[name]
    tokens, params = tokens_of(config), random_params(config)
    expected = outcome(config, params, tokens)
    assert_same(outcome(config, params, tokens, capacity=capacity, chunk=chunk), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sequential_mode(random_params, name):
    config = CONFIGS[name]
    tokens, params = tokens_of(config), random_params(config)
    expected = outcome(config, params, tokens)
    assert_same(outcome(config, params, tokens, chunk=1), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("remat", ["none", "segments"])
def test_the_forward_of_a_gradient_among_others(random_params, name, remat):
    """Rows beside it, recomputed segments, and results that the gradient keeps."""
    config = CONFIGS[name].replace(remat=remat)
    tokens, params = tokens_of(config), random_params(CONFIGS[name])
    f = program(config, numerics="exact")

    def loss(params):
        rows = jnp.stack([jnp.roll(tokens, 3), tokens, tokens[::-1]])
        one = lambda row: run(f, params, init_cache(config, LENGTH), row)[1]
        logits = jax.vmap(one)(rows)
        return jax.nn.logsumexp(logits).sum(), logits[1]

    (_, logits), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_same(logits, outcome(CONFIGS[name], params, tokens)[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_fast_computation_to_rounding(random_params, name):
    config = CONFIGS[name]
    tokens, params = tokens_of(config), random_params(config)
    logits = outcome(config, params, tokens)[1]
    fast = run(program(config), params, init_cache(config, LENGTH), tokens)[1]
    # Other orders of float32 sums, through two layers.
    np.testing.assert_allclose(logits, fast, rtol=0, atol=1e-4 * np.abs(fast).max())
