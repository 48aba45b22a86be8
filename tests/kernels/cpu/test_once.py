"""Numbers that are computed once are what they were, mapped or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cpu.once import once
from kernels.dot import has_kernel

pytestmark = pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)])
def test_numbers_stay(dtype, shape, rng):
    x = jnp.asarray(rng.integers(-100, 100, shape)).astype(dtype)
    np.testing.assert_array_equal(jax.jit(once)(x), x)
    many = jnp.stack([x, x + 1])
    np.testing.assert_array_equal(jax.jit(jax.vmap(once))(many), many)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.vmap(once)))(many[None]), many[None])


def test_what_is_taken_twice_is_computed_once(compiled_text):
    """A loop of its own makes the numbers, and others only read them."""

    def users(x, y):
        z = once(jnp.sqrt(x) * 3)
        return y * z[:, None], y.T - z

    text = compiled_text(jax.jit(users).lower(jnp.ones(8), jnp.ones((8, 8))))
    assert text.count(" sqrt(") == 1
