"""Where cells go, against plain loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import Blocks
from kernels.cells import is_ring, ring_positions, take, write, write_last, write_one
from kernels.options import Options

S = 7
BLOCK = np.arange(2 * S * 3, dtype=np.float32).reshape(1, 2, S, 3)  # [B, K, S, H]
write, write_last = jax.jit(write), jax.jit(write_last, static_argnames="ring")


def cells_of(T):
    """Cells -1 - t of T new tokens, [1, 2, T, 3]."""
    return np.broadcast_to(-1 - np.arange(T, dtype=np.float32)[:, None], (1, 2, T, 3))


def loop(cells, new):
    """What is in the block after each token has been written, if its cell exists."""
    block = BLOCK.copy()
    for t, cell in enumerate(cells):
        if 0 <= cell < S:
            block[:, :, cell] = new[:, :, t]
    return block


def stacked(x):
    return np.concatenate([x, x + 100])


@settings(max_examples=40)
@given(st.sampled_from([1, 4, S]), st.data())
def test_a_chunk_goes_where_its_cells_are(T, data):
    """Also where some, or all, lie beyond the block, and with padding."""
    first, real = data.draw(st.integers(0, S + 2)), data.draw(st.integers(0, T))
    cells = np.where(np.arange(T) < real, first + np.arange(T), -1).astype(np.int32)
    new = cells_of(T)
    np.testing.assert_array_equal(write(BLOCK, cells[None], new), loop(cells, new))
    rows = np.stack([cells, np.full(T, -1, np.int32)])
    got = write(stacked(BLOCK), rows, stacked(new))
    np.testing.assert_array_equal(got[0], loop(cells, new)[0])
    np.testing.assert_array_equal(got[1], BLOCK[0] + 100)


@settings(max_examples=60)
@given(st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3))
def test_the_last_document_is_what_stays(ring, lengths, begin):
    """Documents one after the other, the first one from position `begin` on, then padding."""
    i = np.concatenate([np.arange(n) + (begin if d == 0 else 0) for d, n in enumerate(lengths)])
    i = np.concatenate([i, np.full(24 - len(i), -1)]).astype(np.int32)
    new = cells_of(24)
    last = i[i >= 0][-1]
    got = write_last(BLOCK, i[None], new, ring=ring)
    held = np.arange(max(0, last - S + 1) if ring else 0, min(last + 1, last + 1 if ring else S))
    where = held % S if ring else held
    want = loop(np.where(i >= 0, i % S, -1) if ring else i, new)
    np.testing.assert_array_equal(got[:, :, where], want[:, :, where])


@given(st.integers(-1, 3 * S))
def test_a_ring_holds_the_newest_position_of_each_cell(last):
    held = np.full(S, -1)
    for p in range(last + 1):
        held[p % S] = p
    got = np.asarray(ring_positions(jnp.array([[last]]), S))[0]
    np.testing.assert_array_equal(np.maximum(got, -1), held)


def test_a_ring_is_a_block_of_just_the_window():
    assert is_ring(Options(1.0, 8), 8)
    assert not is_ring(Options(1.0, 8), 9)
    assert not is_ring(Options(1.0), 8)


def test_one_cell_of_each_sequence_in_place():
    cell = stacked(cells_of(1)).swapaxes(1, 2)  # [B, 1, K, H]
    for cells in ([3, -1], [S, 0]):
        blocks = Blocks((stacked(BLOCK),), batched=True)
        (got,) = jax.jit(write_one)(blocks, np.array(cells, np.int32), (cell,))
        for b, slot in enumerate(cells):
            want = loop([slot], cells_of(1) + 100 * b)[0] if b == 0 else BLOCK[0] + 100
            if b == 1 and 0 <= slot < S:
                want = want.copy()
                want[:, slot] = cell[1, 0]
            np.testing.assert_array_equal(got[b], want)
    alone = Blocks((BLOCK[0],))
    (got,) = write_one(alone, np.array([2], np.int32), (cell[:1].astype(np.float64),))
    assert got.dtype == np.float32  # that of the block
    np.testing.assert_array_equal(got, loop([2], cells_of(1))[0])


def test_cells_are_taken_for_all_rows_or_for_each():
    index = np.array([[4, 0], [1, 1]])
    np.testing.assert_array_equal(take(BLOCK, index[:1]), BLOCK[:, :, index[0]])
    want = np.stack([x[:, n] for x, n in zip(stacked(BLOCK), index, strict=True)])
    np.testing.assert_array_equal(take(stacked(BLOCK), index), want)


def test_bfloat16_is_written_as_it_is(compiled_text):
    """XLA on a CPU would otherwise make float32 of the whole block, for each row."""
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    block, rows = array(3, 2, 40, 8), array(3, 5, dtype=jnp.int32)
    one = jax.jit(lambda x, i, new: write_one(Blocks(x, batched=True), i[:, 0], new))
    for function, new in ((write, array(3, 2, 5, 8)), (one, array(3, 1, 2, 8))):
        text = compiled_text(function.lower(block, rows, new))
        assert "bf16[3,2,40,8]" in text and "f32[3,2,40,8]" not in text.replace("bf16", "half")


def test_the_gradient_of_a_ragged_chunk():
    """In float64, against finite differences of a map that is linear."""
    rng = np.random.default_rng(0)
    cells = jnp.int32([[2, 3, -1], [5, 6, 7], [-1, -1, -1]])
    with jax.enable_x64(True):
        block, new, weights = (
            rng.standard_normal(s) for s in ((3, 2, S, 3), (3, 2, 3, 3), (3, 2, S, 3))
        )
        value = lambda block, new: (weights * write(block, cells, new)).sum()
        dblock, dnew = jax.grad(value, (0, 1))(block, new)
        np.testing.assert_allclose((dblock * block).sum() + (dnew * new).sum(), value(block, new))
        np.testing.assert_array_equal(dblock[2], weights[2])
        np.testing.assert_array_equal(dnew[1, :, 0], weights[1, :, 5])
        assert not dblock[0, :, 2:4].any() and not dnew[1, :, 2].any()
