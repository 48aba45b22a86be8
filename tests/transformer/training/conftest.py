"""What tests of training share: random batches, and trees that are equal but for rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.data.batches import Batch

V, T = 29, 24  # of batches, unless a test says otherwise


def _random_batch(random, rows, length=T):
    tokens, targets = random.integers(0, V, (2, rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    weights = random.choice([0.0, 0.5, 1.0], (rows, length)).astype(np.float32)
    weights[:, 0] = 1
    return Batch(tokens, targets, positions, weights)


@pytest.fixture(scope="session")
def random_batch():
    """random_batch(random, rows) makes rows of one document each, some targets without weight."""
    return _random_batch


def _assert_trees_close(a, b, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = max(float(jnp.abs(y).max()), 1e-3)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.fixture(scope="session")
def assert_trees_close():
    """assert_trees_close(a, b, tolerance), in shares of the largest element of each array."""
    return _assert_trees_close
