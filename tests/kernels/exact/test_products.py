"""Products whose rows have the same bits whatever stands beside them, in each way to run them."""

import jax
import numpy as np
import pytest

from kernels.exact import products
from kernels.exact.order import Order
from kernels.exact.products import batched, product, product_by_output


def assert_is_the_product(y, x, w):
    """As far as float32 can tell: no order of K terms errs by more (Higham 2002, section 3.1)."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    most = x.shape[-1] * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(w))
    assert (np.abs(y - x @ w) <= most).all()


@pytest.mark.parametrize("shape", [(24, 40), (64, 192), (600, 65)])
@pytest.mark.parametrize("way", ["found", "tiles of rows"])
def test_a_row_is_as_if_it_were_the_only_one(shape, way, rng, monkeypatch):
    if way != "found":
        monkeypatch.setattr(products, "order", lambda *_: Order(0, False))
    K, N = shape
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((130, K), (K, N)))
    run = jax.jit(lambda x, w: product(x, w))  # not known from another way
    y = np.asarray(run(x, w))
    assert_is_the_product(y, x, w)
    for rows in (1, 2, 17, 64, 65):
        np.testing.assert_array_equal(run(x[:rows], w), y[:rows])


@pytest.mark.parametrize("way", ["found", "as other products"])
@pytest.mark.parametrize("shape", [(24, 40), (64, 256)])
def test_a_row_times_a_matrix_that_is_stored_by_output(shape, way, rng, monkeypatch):
    """As that of a tied embedding, which one row alone would take in another order."""
    if way != "found":
        found = products.order
        monkeypatch.setattr(products, "order", lambda *x: found(*x)._replace(by_output=0))
    K, N = shape
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((130, K), (N, K)))
    run = jax.jit(lambda x, w: product_by_output(x, w))  # not known from another way
    y = np.asarray(run(x, w))
    assert_is_the_product(y, x, w.T)
    np.testing.assert_array_equal(y, jax.jit(product)(x, w.T))
    for count in (1, 2, 17, 64, 65):
        np.testing.assert_array_equal(run(x[:count], w), y[:count])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [None, 0])
def test_rows_of_a_batch(turned, rows, rng, monkeypatch):
    if rows is not None:
        monkeypatch.setattr(products, "few_rows", lambda *_: rows)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 70, 96), (2, 96, 40)))
    given = w.swapaxes(1, 2) if turned else w
    run = jax.jit(lambda x, w: batched(x, w, turned))
    y = np.asarray(run(x, given))
    assert_is_the_product(y, x, w)
    for count in (1, 3, 64):
        np.testing.assert_array_equal(run(x[:, :count], given), y[:, :count])


def test_terms_of_zero_change_nothing(rng):
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, 5, 64), (1, 64, 64)))
    shifted = np.concatenate([np.zeros((1, 5, 64), np.float32), x], 2)
    stacked = np.concatenate([w[:, ::-1], w], 1)
    run = jax.jit(batched)
    np.testing.assert_array_equal(run(shifted, stacked), run(x, w))
