"""Sums in one order, and computations that stand by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.exact.sums import alone, total


@pytest.mark.parametrize("size", [1, 2, 3, 64, 172, 1000])
def test_a_sum_does_not_depend_on_the_rows_beside_it(size, rng):
    x = rng.standard_normal((33, size)).astype(np.float32)
    sums = np.asarray(jax.jit(total)(x))
    for rows in (1, 2, 8):
        np.testing.assert_array_equal(jax.jit(total)(x[:rows]), sums[:rows])
    # A tree of 10 levels rounds 10 times.
    np.testing.assert_allclose(sums, x.astype(np.float64).sum(1), rtol=0, atol=1e-6 * size**0.5)


def test_the_gradient_of_a_sum_is_ones():
    np.testing.assert_array_equal(jax.grad(lambda x: total(x).sum())(jnp.zeros((2, 5))), 1)


def test_alone_keeps_values_and_gradients(rng):
    x = rng.standard_normal(7).astype(np.float32)
    function = lambda x, y: jnp.tanh(x) * y + x
    of = lambda function: jax.value_and_grad(lambda x: function(x, 2 * x).sum())(x)
    results = of(alone(function)), of(function)
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5)  # roundings of float32
