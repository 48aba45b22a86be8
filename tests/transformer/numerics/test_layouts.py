"""Matrices laid out for few rows: the same products, and exact ones have the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cpu.call import is_available
from transformer.numerics.layouts import Table, lay_out, lay_out_table
from transformer.numerics.matrix import dense, is_matrix, row
from transformer.numerics.numerics import EXACT, FAST

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels of a CPU, with multiply-adds")


@pytest.fixture
def operands(rng):
    """x [70, K], w [K, N]; more terms than one chain of sums has, and a number of columns."""
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((70, 640), (640, 100))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_products_have_the_bits_of_the_plain_matrix(dtype, operands):
    x, w = (x.astype(dtype) for x in operands)
    dot = jax.jit(lambda x, w: jax.vmap(EXACT.dot, (0, None))(x, w))
    expected = dot(x, w)
    for rows in (1, 2, 8, 70):
        np.testing.assert_array_equal(dot(x[:rows], lay_out(w, exact=True)), expected[:rows])


@pytest.mark.parametrize("rows", [1, 2, 8, 70])
def test_fast_products(rows, operands):
    x, w = operands
    laid_out = lay_out(w, exact=False)
    assert is_matrix(laid_out)
    y = jax.jit(lambda x, w: jax.vmap(FAST.dot, (0, None))(x, w))(x[:rows], laid_out)
    expected = np.asarray(x[:rows], np.float64) @ np.asarray(w, np.float64)
    # 640 terms of size 1 in float32.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("numerics", [FAST, EXACT])
def test_derivatives_are_those_of_the_plain_matrix(numerics, operands):
    x, w = operands[0][:8], operands[1]

    def gradients(x, w):
        loss = lambda x, w: (jax.vmap(numerics.dot, (0, None))(x, w) ** 2).sum()
        of_x, of_w = jax.jit(jax.grad(loss, (0, 1)))(x, w)
        return of_x, dense(of_w)

    for got, wanted in zip(gradients(x, lay_out(w, exact=False)), gradients(x, w), strict=True):
        # Sums of 100 and 8 products of numbers of size 25 and 1, in float32.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_it_stands_for_the_matrix(exact, operands):
    w = jnp.stack([operands[1], 2 * operands[1]])
    laid_out = lay_out(w, exact)
    assert laid_out.shape == w.shape and laid_out.ndim == 3 and laid_out.dtype == w.dtype
    np.testing.assert_array_equal(dense(laid_out), w)
    second = jax.tree.map(lambda x: x[1], laid_out)
    np.testing.assert_array_equal(dense(second), w[1])


@pytest.mark.parametrize("numerics", [FAST, EXACT])
def test_a_table_is_looked_up_and_multiplied_by(numerics, operands):
    x, table = operands[0][:8], operands[1].T
    laid_out = lay_out_table(table, numerics.exact)
    # The order that exact products want is not had without optimisation.
    assert isinstance(laid_out, Table) or numerics.exact
    np.testing.assert_array_equal(row(laid_out, 7), table[7])
    assert np.isnan(row(laid_out, len(table))).all()
    dot = jax.jit(lambda x, table: jax.vmap(numerics.dot_table, (0, None))(x, table))
    # Fast products have orders of their own.
    tolerance = 0 if numerics.exact else 1e-3
    np.testing.assert_allclose(dot(x, laid_out), dot(x, table), rtol=0, atol=tolerance)
    np.testing.assert_array_equal(dense(laid_out), table)
