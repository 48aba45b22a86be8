"""Where new cells go in a block [B, K, S, H]: slice updates, never a scatter.

A cell that lies outside of the block is not written; -1 stands for no cell. Where cells or
positions are [1, T], all sequences share them; where they are [B, T], each sequence has its own.

A block of exactly `window` cells is a ring: position p lies in cell p % window.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from kernels.cpu.write import write as copy
from kernels.dot import has_kernel
from kernels.options import Options
from kernels.tracing.linear import linear_call


def is_ring(options: Options, size: int) -> bool:
    """Whether a block of `size` cells is a ring."""
    return options.window == size


def ring_positions(last, size: int):
    """The position that each cell of a ring holds once `last` [B or 1, 1] is written.

    The result is [B or 1, S], negative where a cell is still empty.
    """
    return last - (last - jnp.arange(size, dtype=last.dtype)) % size


def write(block, cells, new):
    """Writes new cells [B, K, T, H] into a block [B, K, S, H] at consecutive cells [B or 1, T].

    Padding is the cell -1 and must come last in a row. Raises ValueError if T exceeds S.
    """
    size, count = block.shape[2], new.shape[2]
    if count > size:
        raise ValueError(
            f"a chunk of {count} tokens does not fit a block of {size} cells; use a cache with a "
            f"capacity of at least {count}, or a smaller chunk."
        )

    if count == size and cells.shape[0] > 1:
        return _write_whole(block, cells, new)

    def row(block, cells, new):  # block [..., K, S, H]
        # Near the end of the block the slice starts before the first new cell.
        start = jnp.clip(cells[0], 0, size - count)
        shift = cells[0] - start
        cells, new = jnp.roll(cells, shift), jnp.roll(new, shift, new.ndim - 2)
        old = jax.lax.dynamic_slice_in_dim(block, start, count, new.ndim - 2)
        mine = cells == start + jnp.arange(count, dtype=cells.dtype)
        new = jnp.where(mine[:, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(block, new, start, new.ndim - 2)

    if cells.shape[0] == 1:
        return row(block, cells[0], new)

    def rows(cells, operands):
        def each(b, block):
            one = partial(jax.lax.dynamic_index_in_dim, index=b, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(
                block, row(one(block), one(cells), one(new)), b, 0
            )

        block, new = map(_bits, operands)
        written = jax.lax.fori_loop(0, len(block), each, block)
        return jax.lax.bitcast_convert_type(written, operands[0].dtype)

    if jnp.issubdtype(block.dtype, jnp.integer):  # which has no gradient
        return rows(cells, (block, new))
    return linear_call(rows, write_transposed, cells, (block, new), results=block)


def write_transposed(cells, dblock):
    """Cotangents of block and new: a cell that was written passes its own on to the new one."""
    size = dblock.shape[2]
    inside = (cells >= 0) & (cells < size)
    first = jnp.where(inside, cells, size).min(1, keepdims=True)
    last = jnp.where(inside, cells, -1).max(1, keepdims=True)
    slots = jnp.arange(size, dtype=cells.dtype)
    kept = (slots < first) | (slots > last)
    dnew = take(dblock, jnp.clip(cells, 0, size - 1))
    mask = lambda chosen, x: jnp.where(chosen[:, None, :, None], x, 0)
    return mask(kept, dblock), mask(inside, dnew)


def _bits(x):
    """Numbers of 16 bits as integers, others as they are.

    XLA on a CPU updates bfloat16 in float32: in a loop it would convert the whole block each time.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _write_whole(block, cells, new):
    """`write` of as many tokens as there are cells, each sequence with its own [B, T].

    In training all rows begin at cell 0. There is no loop over rows then, which devices that have
    a part of the rows each would have to send to each other.
    """

    def shifted(cells, new):
        first = jnp.maximum(cells[:, 0], 0)
        return _roll(cells[:, None, :, None], first)[:, 0, :, 0], _roll(new, first)

    as_they_are = lambda *operands: operands
    cells, new = jax.lax.cond((cells[:, 0] > 0).any(), shifted, as_they_are, cells, new)
    mine = cells == jnp.arange(cells.shape[1], dtype=cells.dtype)
    return jnp.where(mine[:, None, :, None], new, block)


def _roll(x, shift):
    """x [B, K, T, H] rolled by `shift` [B] along T, bit by bit: no gather, and no scatter after."""
    for bit in range(x.shape[2].bit_length()):
        moved = (shift >> bit & 1).astype(bool)
        x = jnp.where(moved[:, None, None, None], jnp.roll(x, 1 << bit, 2), x)
    return x


def write_last(block, i, new, *, ring: bool):
    """The block after a chunk in which positions may begin again at 0.

    Each cell takes the newest token of the last document that falls on it.

    Args:
      block: [B, K, S, H].
      i: [B or 1, T] int32, positions; padding is -1 and comes last in a row.
      new: [B, K, T, H].
      ring: whether the block is one.
    """
    size = block.shape[2]
    end = (i >= 0).sum(1, keepdims=True, dtype=i.dtype) - 1  # the last token that is not padding
    last = jnp.take_along_axis(i, jnp.maximum(end, 0), axis=1)
    cells = jnp.arange(size, dtype=i.dtype)[None]
    held = ring_positions(last, size) if ring else cells
    source = held - (last - end)
    fresh = (held >= 0) & (held <= last) & (source >= 0)
    taken = take(new, jnp.clip(source, 0, new.shape[2] - 1))
    return jnp.where(fresh[:, None, :, None], taken, block)


def take(block, index):
    """Cells `index` [B or 1, S'] of a block [B, K, S, H] -> [B, K, S', H]."""
    if index.shape[0] == 1:
        return jnp.take(block, index[0], axis=2)
    return jax.vmap(partial(jnp.take, axis=1))(block, index)


def in_order(ring, stop):
    """The cells of a ring in the order of their positions, the last one before `stop`."""
    size = ring.shape[2]
    return take(ring, (stop + jnp.arange(size, dtype=stop.dtype)) % size)


def consecutive(first, i):
    """Cells from `first` on, one for each token at positions i; -1 for padding."""
    return jnp.where(i < 0, -1, first + jnp.arange(i.shape[1], dtype=i.dtype))


def write_one(blocks: Blocks, cells, cell, axis: int = 1):
    """Writes one cell of each sequence, in place.

    Args:
      blocks: arrays of blocks [K, S, ...]; or [S, ...], with axis 0.
      cells: [B or 1] int32, the cell of each sequence.
      cell: the new cell, a pytree of arrays [B, 1, K, ...]; or [B, 1, ...].
      axis: the axis of a block along which its S cells lie.

    Returns:
      The arrays of the blocks.
    """

    given = blocks.arrays
    cell = jax.tree.map(lambda x, new: new.astype(x.dtype), given, cell)
    if blocks.batched and has_kernel():
        rows = jnp.broadcast_to(cells, len(jax.tree.leaves(given)[0]))
        put = lambda x, new: copy(x, blocks.layer, rows, new[:, 0], axis)
        return jax.tree.map(put, given, cell)

    def row(b, arrays):
        slot = cells[b if cells.shape[0] > 1 else 0]

        def one(x, new):
            new = jax.lax.dynamic_index_in_dim(new, b, keepdims=False)[0]
            new = jnp.expand_dims(new, axis)
            size = x.shape[x.ndim - new.ndim + axis]
            inside = (slot >= 0) & (slot < size)
            at = blocks.index(
                b, *(jnp.maximum(slot, 0) if n == axis else 0 for n in range(new.ndim))
            )
            new = new.reshape((1,) * (x.ndim - new.ndim) + new.shape)
            old = jax.lax.dynamic_slice(x, at, new.shape)
            return jax.lax.dynamic_update_slice(x, jnp.where(inside, new, old), at)

        return jax.tree.map(one, arrays, cell)

    cell, arrays = (jax.tree.map(_bits, x) for x in (cell, given))
    if blocks.batched:
        arrays = jax.lax.fori_loop(0, len(jax.tree.leaves(arrays)[0]), row, arrays)
    else:
        arrays = row(0, arrays)
    return jax.tree.map(lambda x, y: jax.lax.bitcast_convert_type(y, x.dtype), given, arrays)
