"""New cells of sequences, copied by the kernel, against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.write import write
from kernels.dot import has_kernel

pytestmark = pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")

B, L, S = 3, 2, 5


@settings(max_examples=30)
@given(
    st.sampled_from(["float32", "bfloat16", "int8", "bool", "complex64"]),
    st.sampled_from([(), (4,), (2, 3)]),
    st.sampled_from([None, 0, L - 1]),
    st.sampled_from([0, 1]),
    st.lists(st.integers(-2, S + 1), min_size=B, max_size=B),
)
def test_each_sequence_has_its_cell_if_there_is_one(dtype, of_cell, layer, axis, cells):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.integers(0, 100, shape)).astype(dtype)
    heads, layers = (2,) * axis, () if layer is None else (L,)
    block, new = draw(B, *layers, *heads, S, *of_cell), draw(B, *heads, *of_cell)
    wanted = np.array(block)
    for row, cell in enumerate(cells):
        if 0 <= cell < S:
            one = wanted[row] if layer is None else wanted[row, layer]
            one[(slice(None),) * axis + (cell,)] = np.asarray(new)[row]
    place = None if layer is None else jnp.int32(layer)
    got = jax.jit(write, static_argnums=4)(block, place, jnp.array(cells), new, axis)
    np.testing.assert_array_equal(got, wanted)


def test_what_is_empty_stays():
    block = jnp.zeros((2, 1, 4, 0))
    assert write(block, None, jnp.zeros(2, jnp.int32), jnp.zeros((2, 1, 0)), 1) is block
