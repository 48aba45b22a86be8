"""Products of few rows on a CPU: their bits are those of chains of multiply-adds, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cpu.call import is_available
from kernels.cpu.product import matrix, panels, products
from kernels.cpu.tiles import TYPES
from kernels.exact.order import chains

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels of a CPU, with multiply-adds")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (130, 65), (200, 192)])
@pytest.mark.parametrize("block", [64, 100, 512])
def test_each_row_is_a_sum_in_one_order(shape, dtype, block, rng):
    K, N = shape
    rows = int(rng.integers(1, 20))
    x = rng.standard_normal((rows, K)).astype(np.float32)
    w = jnp.asarray(rng.standard_normal((K, N)), dtype)
    run = jax.jit(lambda x, w: products(x, [panels(w)], block)[0])
    y = np.asarray(run(x, w))
    assert y.shape == (rows, N + -N % 64) and y.dtype == np.float32
    np.testing.assert_array_equal(y[:, :N], chains(x, np.asarray(w, np.float32), block))
    assert not y[:, N:].any()
    np.testing.assert_array_equal(run(x[-1:], w), y[-1:])


def test_several_matrices_are_as_each_by_itself(rng):
    x = rng.standard_normal((3, 100)).astype(np.float32)
    ws = [panels(rng.standard_normal((100, N)).astype(np.float32)) for N in (130, 1, 64)]
    for y, w in zip(products(x, ws, 64), ws, strict=True):
        np.testing.assert_array_equal(y, products(x, [w], 64)[0])


def test_the_matrix_comes_back_from_its_panels(rng):
    w = jnp.asarray(rng.standard_normal((3, 5, 100)))
    assert panels(w).shape == (3, 2, 5, 64)
    np.testing.assert_array_equal(matrix(panels(w))[..., :100], w)


def test_what_is_no_number_shows(rng):
    x = rng.standard_normal((2, 8)).astype(np.float32)
    x[1, 3] = np.nan
    [y] = products(x, [panels(jnp.ones((8, 64)))], 512)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


def test_many_calls_at_once(rng):
    """Threads of the pool come late, to calls that have ended."""
    x = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((64, 640)), jnp.float32)
    [expected] = products(x, [panels(w)], 64)

    def step(n, worst):
        [y] = products(x + 0 * worst, [panels(w)], 64)
        return jnp.maximum(worst, jnp.abs(y - expected).max())

    assert jax.jit(lambda: jax.lax.fori_loop(0, 2000, step, 0.0))() == 0


def test_int8_with_scales(rng):
    x = rng.standard_normal((5, 128)).astype(np.float32)
    w = rng.integers(-127, 128, (128, 100)).astype(np.int8)
    scales = rng.standard_normal((4, 100)).astype(np.float32)
    several = products(x, [panels(w)] * 2, 32, [panels(scales), panels(2 * scales)])
    y, twice = (y[:, :100] for y in several)
    expected = np.float64(x) @ (w * np.repeat(np.float64(scales), 32, 0))
    # 128 terms of size 100 in float32.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-2)
    chain = [chains(x[:, k : k + 32], np.float32(w[k : k + 32]), 32) for k in range(0, 128, 32)]
    parts = [one * scale for one, scale in zip(chain, scales, strict=True)]
    np.testing.assert_array_equal(y, ((parts[0] + parts[1]) + parts[2]) + parts[3])
    np.testing.assert_array_equal(twice, 2 * y)
