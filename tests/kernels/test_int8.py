"""Cells of int8 numbers: what rounding loses, and that it has no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.int8 import Int8, floats, is_int8, quantise


def test_a_number_is_off_by_half_a_step_of_its_head(rng):
    x = rng.standard_normal((9, 2, 16)).astype(np.float32)
    x[0, 0] = 0
    kept = quantise(x)
    assert is_int8(kept) and not is_int8(x)
    assert kept.numbers.dtype == np.int8 and kept.scales.shape == (9, 2, 1)
    half_a_step = np.abs(x).max(-1, keepdims=True) / 254
    # And the rounding of float32 on top.
    assert (np.abs(floats(kept) - x) <= half_a_step * (1 + 1e-5)).all()
    np.testing.assert_array_equal(np.abs(kept.numbers).max(-1).ravel()[1:], 127)


def test_other_arrays_stay_as_they_are(rng):
    x = rng.standard_normal((2, 4)).astype(np.float32)
    kept, same = floats((quantise(x), x), jnp.bfloat16)
    assert kept.dtype == jnp.bfloat16 and same is x
    assert jax.tree.structure((Int8(0, 0), 0)).num_leaves == 3


def test_there_is_no_gradient(rng):
    x = rng.standard_normal((2, 4)).astype(np.float32)
    with pytest.raises(NotImplementedError, match="cells in int8 have no gradient"):
        jax.grad(lambda x: floats(quantise(x)).sum())(x)
