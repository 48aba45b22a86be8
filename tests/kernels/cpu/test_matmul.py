"""Products of many rows on a CPU: the bits of chains, however the operands lie."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cpu.call import is_available
from kernels.cpu.matmul import matmul
from kernels.cpu.product import panels, products
from kernels.cpu.tiles import TYPES
from kernels.exact.order import chains

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels of a CPU, with multiply-adds")
LAYOUTS = {"rows": lambda w: w, "columns": jnp.transpose, "panels": panels}


@partial(jax.jit, static_argnums=(2, 3, 4))
def many_and_few(x, w, block, layout, turned):
    """Products of all rows, and of three by the kernel for few: one program for each shape."""
    y = matmul(x.T if turned else x, LAYOUTS[layout](w), block, layout, turned)
    [few] = products(x[:3], [panels(w)], block)
    return y, few


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_each_row_is_a_sum_in_one_order(layout, turned, dtype, rng):
    for M, K, N in [(1, 1, 1), (7, 130, 70), (601, 20, 64), *rng.integers(1, 300, (3, 3))]:
        block = int(rng.choice([64, 100, 512]))
        x = rng.standard_normal((M, K)).astype(np.float32)
        w = jnp.asarray(rng.standard_normal((K, N)), dtype)
        y, few = map(np.asarray, many_and_few(x, w, block, layout, turned))
        np.testing.assert_array_equal(y[:, :N], chains(x, np.asarray(w, np.float32), block))
        np.testing.assert_array_equal(y[:3, :N], few[:, :N])


def test_what_is_no_number_stays_in_its_row(rng):
    x = rng.standard_normal((20, 8)).astype(np.float32)
    x[11, 3] = np.nan
    y = np.asarray(matmul(x, jnp.ones((8, 70)), 512))
    assert np.isnan(y[11]).all() and np.isfinite(np.delete(y, 11, 0)).all()


def test_no_rows_and_no_terms():
    assert matmul(jnp.ones((0, 8)), jnp.ones((8, 64)), 512).shape == (0, 64)
    assert not matmul(jnp.ones((3, 0)), jnp.ones((0, 64)), 512).any()
