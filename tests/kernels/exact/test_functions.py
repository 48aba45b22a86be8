"""Functions whose bits do not depend on the loop that they are computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.exact.functions import exp

EDGES = [0.0, -0.0, 1e-30, -87.3, -87.4, 88.7, 88.8, -1e30, 1e30, -np.inf, np.inf, np.nan]


@pytest.fixture
def x(rng):
    return np.concatenate([20 * rng.standard_normal(100_000), EDGES]).astype(np.float32)


def test_exp_is_right_to_two_units_in_the_last_place(x):
    y, expected = np.asarray(jax.jit(exp)(x)), np.exp(x.astype(np.float64))
    normal = (expected > 1.2e-38) & (expected < 3.4e38)
    units = np.abs(y - expected)[normal] / np.spacing(expected[normal].astype(np.float32))
    assert units.max() <= 2
    np.testing.assert_array_equal(y[expected < 1.1e-38], 0)
    np.testing.assert_array_equal(y[expected > 3.5e38], np.inf)
    assert np.isnan(y[-1])


def test_exp_in_loops_of_any_length(x):
    """XLA's own has other last bits in loops of 3 and 7 numbers."""
    run = jax.jit(exp)
    whole = run(x)
    for size in (1, 2, 3, 5, 7, 9, 13):
        some = [run(x[n : n + size]) for n in range(0, 40 * size, size)]
        np.testing.assert_array_equal(np.concatenate(some), whole[: 40 * size])


def test_derivative(x):
    x = x[:100]
    np.testing.assert_array_equal(jax.vmap(jax.grad(exp))(x), exp(x))


def test_half_precision_is_rounded_once():
    x = jnp.linspace(-5, 5, 100, dtype=jnp.bfloat16)
    expected = np.exp(np.asarray(x, np.float64)).astype(jnp.bfloat16)
    # One unit of bfloat16, since XLA computes it in float32 and rounds again.
    np.testing.assert_allclose(exp(x).astype(np.float32), expected.astype(np.float32), rtol=2**-8)
