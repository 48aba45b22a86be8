"""A chunk written by one kernel, run by the interpreter: nothing but `kernels.cells.write`.

These are the tests of writing and write_kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cells as slices

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.backends.triton import interpret


@st.composite
def chunks(draw):
    """A block, consecutive cells of each row with padding at the end, and new cells."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    B, K, T = draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 40))
    S, H = draw(st.integers(T, 90)), draw(st.sampled_from([8, 20, 300]))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    cells = rng.integers(0, S, (B, 1)) + np.arange(T)  # some rows leave the block
    cells[np.arange(T) >= rng.integers(0, T + 1, (B, 1))] = -1
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return normal(B, K, S, H), jnp.asarray(cells, jnp.int32), normal(B, K, T, H)


@settings(max_examples=8)
@given(chunks())
def test_it_writes_what_slice_updates_write(chunk):
    np.testing.assert_array_equal(interpret.write(*chunk), slices.write(*chunk))


def test_its_derivatives_are_those_of_slice_updates(rng):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    block, new, weights = normal(3, 2, 9, 8), normal(3, 2, 4, 8), normal(3, 2, 9, 8)
    cells = jnp.int32([[0, 1, 2, -1], [7, 8, 9, 10], [-1, -1, -1, -1]])

    def gradients(write):
        loss = lambda block, new: (weights * write(block, cells, new) ** 2).sum()
        return jax.grad(loss, (0, 1))(block, new)

    for mine, theirs in zip(gradients(interpret.write), gradients(slices.write), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    moved = [
        jax.jvp(lambda *x, write=write: write(x[0], cells, x[1]), (block, new), (weights, new))[1]
        for write in (interpret.write, slices.write)
    ]
    np.testing.assert_array_equal(*moved)


def test_sequences_that_are_mapped_join_the_rows(rng):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    block, new = normal(2, 2, 1, 9, 8), normal(2, 2, 1, 4, 8)
    cells = jnp.arange(4, dtype=jnp.int32) + jnp.int32([[0], [5]])
    mapped = jax.vmap(interpret.write, in_axes=(0, None, 0))(block, cells, new)
    for n in range(2):
        np.testing.assert_array_equal(mapped[n], slices.write(block[n], cells, new[n]))


@pytest.mark.parametrize(("rows", "T"), [(1, 4), (2, 10)])
def test_what_one_slice_update_does_is_left_to_it(rows, T):
    block, cells = jnp.zeros((2, 1, 9, 8)), jnp.zeros((rows, T), jnp.int32)
    with pytest.raises(NotImplementedError, match="slice update"):
        interpret.write(block, cells, jnp.zeros((2, 1, T, 8)))
