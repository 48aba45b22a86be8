"""Attention as a memory: what one token means, against the formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.memory.softmax import Softmax

T, S, K, N, H, HV = 11, 16, 2, 4, 4, 3
SLOPES = (0.5, 0.25, 0.1, 0.05)


def attention(q, k, v, sinks, scale, window, soft_cap, slopes):
    """q [T, N, H], k [T, K, H], v [T, K, Hv] -> [T, N, Hv], in loops."""
    z = np.zeros((len(q), N, v.shape[-1]))
    for i in range(len(q)):
        for n in range(N):
            head, first = n // (N // K), 0 if window is None else max(0, i - window + 1)
            scores = k[first : i + 1, head] @ q[i, n] * (H**-0.5 if scale is None else scale)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if slopes is not None:
                scores = scores - slopes[n] * (i - np.arange(first, i + 1))
            weights = np.exp(scores)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
            z[i, n] = weights @ v[first : i + 1, head] / total
    return z


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 4, S, S + 3]),
    soft_cap=st.sampled_from([None, 1.5]),
    slopes=st.sampled_from([None, SLOPES]),
    has_sinks=st.booleans(),
)
def test_step_is_the_formula(seed, scale, window, soft_cap, slopes, has_sinks):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((T, *x)) for x in ((N, H), (K, H), (K, HV)))
    sinks = rng.standard_normal(N) if has_sinks else None
    memory = Softmax(scale, window, soft_cap, slopes)
    with jax.enable_x64(True):
        shape = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        step = lambda block, x: memory.step(block, *x, sinks)
        tokens = jnp.arange(T, dtype=jnp.int32), (k, v), q
        block = memory.empty(S, (shape(k), shape(v)))
        _, z = jax.jit(lambda: jax.lax.scan(step, block, tokens))()
    # float64: sums of a few terms, in another order.
    expected = attention(q, k, v, sinks, scale, window, soft_cap, slopes)
    np.testing.assert_allclose(z, expected, atol=1e-12)


@pytest.mark.parametrize(("window", "size"), [(None, 20), (5, 5), (20, 20), (100, 20)])
def test_a_window_bounds_its_block(window, size):
    cell = (jax.ShapeDtypeStruct((K, H), jnp.bfloat16), jax.ShapeDtypeStruct((K, HV), jnp.float32))
    keys, values = Softmax(window=window).empty(20, cell)
    assert keys.shape == (K, size, H) and keys.dtype == jnp.bfloat16
    assert values.shape == (K, size, HV) and values.dtype == jnp.float32


@pytest.mark.parametrize(
    "cell", [np.ones((K, H)), (np.ones((K, H)), np.ones((K + 1, H))), (np.ones(H), np.ones(H))]
)
def test_a_cell_is_keys_and_values_of_the_same_heads(cell):
    with pytest.raises(ValueError, match=r"a pair \(k \[K, H\], v \[K, Hv\]\) with the same K"):
        Softmax().empty(8, cell)


@pytest.mark.parametrize("window", [None, 4])
def test_padding_writes_nothing_and_reads_zeros(window, rng):
    memory = Softmax(window=window)
    block = tuple(np.float32(rng.standard_normal(x)) for x in ((K, 4, H), (K, 4, HV)))
    cell = tuple(np.full((K, n), np.nan, np.float32) for n in (H, HV))
    query = np.ones((N, H), np.float32)
    after, z = jax.jit(memory.step)(block, jnp.int32(-1), cell, query, np.ones(N, np.float32))
    jax.tree.map(np.testing.assert_array_equal, after, block)
    assert not np.any(z)
