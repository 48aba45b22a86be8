"""Blocks in every layout: one sequence or several, one layer or a stack of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.blocks import Blocks

B, L = 2, 3


@pytest.fixture(params=["", "B", "L", "BL"])
def blocks(request, rng):
    """Keys [2, 5] and values [4] of one block; layer 1 is meant where they are stacked."""
    front = (B,) * ("B" in request.param) + (L,) * ("L" in request.param)
    arrays = rng.normal(size=(*front, 2, 5)), rng.normal(size=(*front, 4))
    layer = jnp.int32(1) if "L" in request.param else None
    return Blocks(jax.tree.map(jnp.asarray, arrays), layer, "B" in request.param)


def test_a_block_is_taken_with_an_axis_of_sequences(blocks):
    block = blocks.take()
    assert [x.ndim for x in block] == [3, 2]
    assert {x.shape[0] for x in block} == {B if blocks.batched else 1}


def test_what_is_put_is_taken_and_nothing_else_changes(blocks):
    new = jax.tree.map(lambda x: x + 1, blocks.take())
    after = Blocks(blocks.put(new), blocks.layer, blocks.batched)
    jax.tree.map(np.testing.assert_array_equal, after.take(), new)
    back = after.put(blocks.take())
    jax.tree.map(np.testing.assert_array_equal, back, blocks.arrays)
    if blocks.layer is not None:
        axis = int(blocks.batched)
        others = lambda x: np.delete(np.asarray(x), 1, axis)
        jax.tree.map(
            np.testing.assert_array_equal,
            *(jax.tree.map(others, b.arrays) for b in (after, blocks)),
        )


def test_the_index_of_a_slice(blocks):
    row = B - 1 if blocks.batched else 0
    keys, _ = blocks.arrays
    at = [int(n) for n in blocks.index(row, 1, 3)]
    assert len(at) == keys.ndim
    np.testing.assert_array_equal(keys[tuple(at)], blocks.take()[0][row, 1, 3])


def test_it_is_a_pytree_of_its_arrays_and_layer(blocks):
    again = jax.jit(lambda x: x)(blocks)
    assert again.batched == blocks.batched
    jax.tree.map(np.testing.assert_array_equal, again, blocks)
