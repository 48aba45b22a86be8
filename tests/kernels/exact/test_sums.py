"""Sums in one order, and products that are rounded before they feed a sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.exact.sums import WAYS, rounded, short, tree
from kernels.exact.total import powers, total


@pytest.mark.parametrize("size", [1, 2, 3, 64, 172, 1000])
def test_a_sum_does_not_depend_on_the_rows_beside_it(size, rng):
    x = rng.standard_normal((33, size)).astype(np.float32)
    sums = np.asarray(jax.jit(total)(x))
    for rows in (1, 2, 8):
        np.testing.assert_array_equal(jax.jit(total)(x[:rows]), sums[:rows])
    # A tree of 10 levels rounds 10 times.
    np.testing.assert_allclose(sums, x.astype(np.float64).sum(1), rtol=0, atol=1e-6 * size**0.5)


@pytest.mark.parametrize("size", [1, 65, 172, 1000])
def test_sums_of_powers(size, rng):
    x = 10 * rng.standard_normal((33, size)).astype(np.float32)
    x[3], x[4, 0], x[5] = -np.inf, np.nan, 100 + x[5]
    run = jax.jit(powers)
    peak, sums = map(np.asarray, run(x))
    for rows in (1, 4, 8):
        peaks, sums_of_few = run(x[:rows])
        np.testing.assert_array_equal(sums_of_few, sums[:rows])
        np.testing.assert_array_equal(peaks[:4], peak[: min(rows, 4)])
    assert peak[3] == sums[3] == 0 and np.isnan(sums[4])
    good = np.delete(np.arange(33), [3, 4])
    np.testing.assert_array_equal(peak[good], x[good].max(1))
    expected = np.exp(np.float64(x[good]) - x[good].max(1, keepdims=True)).sum(1)
    # A power is off by an ulp, and so is each of ten sums.
    np.testing.assert_allclose(sums[good], expected, rtol=2e-6)
    lse = lambda x: powers(x)[0] + jnp.log(powers(x)[1])
    gradient = jax.jit(jax.vmap(jax.grad(lse)))(x[good])
    np.testing.assert_allclose(gradient, jax.nn.softmax(x[good]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_short_sum_is_that_of_the_tree(axis, rng):
    for size in (1, 2, 5, WAYS):
        x = rng.standard_normal((size, size, size)).astype(np.float32)
        wanted = jax.jit(tree)(np.moveaxis(x, axis, -1))
        np.testing.assert_array_equal(jax.jit(short, static_argnums=1)(x, axis), wanted)
    gradient = jax.grad(lambda x: (short(x, axis) * jnp.arange(3.0)).sum())(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(np.moveaxis(gradient, axis, -1), [[n] * 3 for n in range(3)])


def test_the_gradient_of_a_sum_is_ones():
    np.testing.assert_array_equal(jax.grad(lambda x: total(x).sum())(jnp.zeros((2, 5))), 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_keeps_every_number(dtype, rng):
    special = [0.0, -0.0, jnp.inf, -jnp.inf, 1e-45, 3e38]
    x = jnp.asarray([*special, *rng.standard_normal(100)], dtype)
    y = jax.jit(rounded)(x)
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    assert jnp.isnan(jax.jit(rounded)(jnp.asarray(jnp.nan, dtype)))
    np.testing.assert_array_equal(jax.grad(lambda x: rounded(x).sum())(x), jnp.ones(x.shape))


def test_a_product_is_rounded_before_a_sum(rng):
    """As NumPy does it, which has no instruction for both."""
    x, y, z = rng.standard_normal((3, 1000)).astype(np.float32)
    made = jax.jit(lambda x, y, z: rounded(x * y) + z)(x, y, z)
    np.testing.assert_array_equal(made, x * y + z)


def test_a_rounding_to_a_narrow_type_is_not_left_out(rng):
    x = rng.standard_normal(1000).astype(np.float32)
    made = jax.jit(lambda x: rounded(x.astype(jnp.bfloat16)).astype(jnp.float32) * 1)(x)
    np.testing.assert_array_equal(made, x.astype(jnp.bfloat16).astype(np.float32))
