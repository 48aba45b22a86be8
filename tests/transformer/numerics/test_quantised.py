"""Matrices in int8: what rounding loses, and that a product is that of the rounded matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.numerics.matrix import dense, row
from transformer.numerics.numerics import EXACT, FAST
from transformer.numerics.quantised import Quantised, is_quantised, quantise


def test_numbers_are_rounded_to_steps_of_their_group(rng):
    x = rng.standard_normal((2, 96, 5)).astype(np.float32)
    x[0, :32, 0] = 0
    q = quantise(x)
    assert q.values.dtype == np.int8
    assert q.scales.shape == (2, 3, 5)  # of 32 numbers, which divide 96
    largest = np.abs(x).reshape(2, 3, 32, 5).max(2, keepdims=True).repeat(32, 2).reshape(x.shape)
    error = np.abs(q.dense() - x)
    # Half a step, and the rounding of float32 on top.
    assert (error <= largest / 127 * 0.5 + 1e-6).all()
    np.testing.assert_array_equal(quantise(x[0]).T.dense(), quantise(x[0]).dense().T)
    assert not is_quantised(quantise(x, is_table=True))  # 5 numbers are too few
    assert (quantise(np.full((64, 1), -3.0)).values == -127).all()


def test_rows_of_a_table(rng):
    table = quantise(rng.standard_normal((7, 64)).astype(np.float32), is_table=True)
    np.testing.assert_array_equal(row(table, jnp.int32(3)), table.dense()[3])
    for outside in (7, -1):
        assert np.isnan(row(table, jnp.int32(outside))).all()


def random_matrix(rng, *shape):
    """Scales are powers of two, so that values * scales are not rounded."""
    values = jnp.asarray(rng.integers(-127, 128, shape, np.int8))
    groups = (*shape[:-2], shape[-2] // 64, shape[-1])
    return Quantised(values, jnp.float32(2.0) ** rng.integers(-9, -5, groups))


@pytest.mark.parametrize("tokens", [1, 4, 5])
@pytest.mark.parametrize("numerics", [FAST, EXACT])
def test_a_product_is_that_of_the_rounded_matrix(rng, tokens, numerics):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((tokens, 192)))
        w = random_matrix(rng, 192, 6)
        dot = jax.vmap(numerics.dot, (0, None))
        # Sums of 192 products of up to 16 in float64, in two orders.
        np.testing.assert_allclose(dot(x, w), x @ dense(w).astype(x.dtype), rtol=0, atol=1e-11)
        table = Quantised(w.values.T, w.scales.T, is_table=True)
        np.testing.assert_allclose(dot(x, table.T), dot(x, w), rtol=0, atol=1e-11)


def test_several_matrices_and_gradients(rng):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((3, 64)))
        w = random_matrix(rng, 3, 64, 6)
        plain = dense(w).astype(x.dtype)
        pairs = jax.vmap(FAST.dot)(x, w)
        np.testing.assert_allclose(pairs, jnp.einsum("mk,mkn->mn", x, plain), rtol=0, atol=1e-11)
        alone = jax.vmap(FAST.dot, (None, 0))(x[0], w)
        np.testing.assert_allclose(alone, jnp.einsum("k,mkn->mn", x[0], plain), rtol=0, atol=1e-11)
        of = lambda dot: jax.grad(lambda x: jnp.sin(jax.vmap(dot)(x, w)).sum())(x)
        wanted = of(lambda x, w: x @ dense(w).astype(x.dtype))
        np.testing.assert_allclose(of(FAST.dot), wanted, rtol=0, atol=1e-11)
