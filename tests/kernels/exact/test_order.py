"""The order of a product's sums, as it is found and kept."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.exact import order


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    order._known.cache_clear()
    yield tmp_path
    order._known.cache_clear()


def test_chains_are_blocks_of_sums(rng):
    x, w = rng.standard_normal((3, 10)), rng.standard_normal((10, 4))
    np.testing.assert_allclose(order.chains(x, w, 4), x @ w, rtol=1e-12)
    x, w = np.float32([[1e8, 1, -1e8]]), np.ones((3, 1), np.float32)
    assert order.chains(x, w, 3) == 0 and order.chains(x, w, 2) == 0


def test_what_was_found_is_kept(cache):
    found = order.order(96, 64, jnp.float32), order.few_rows(64, 64, jnp.float32, turned=True)
    [file] = (cache / "unison").glob("order-*.json")
    kept = json.loads(file.read_text())
    assert tuple(kept["product 96 64 float32"]) == found[0]
    assert kept["batch 64 64 float32 True"] == found[1]


def test_a_damaged_file_is_found_anew(cache):
    found = order.order(96, 64, jnp.float32)
    [file] = (cache / "unison").glob("order-*.json")
    file.write_text("{")
    order._known.cache_clear()
    assert order.order(96, 64, jnp.float32) == found
