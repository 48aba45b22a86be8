"""Where new cells go in a block [B, K, S, H]: slice updates, never a scatter.

Cell numbers are consecutive within a chunk; -1 marks padding. A cell number outside of the block
writes nothing. Numbers [1, T] are shared by all sequences, [B, T] give each sequence its own.

A block of exactly `window` cells is a ring: position p lives in cell p % window.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.options import Options


def is_ring(options: Options, size: int) -> bool:
    """Whether a block of `size` cells is a ring."""
    return options.window == size


def ring_positions(last, size: int):
    """The position that each cell of a ring holds once `last` [B or 1, 1] is written.

    Negative where the cell is still empty. Returns [B or 1, S].
    """
    return last - (last - jnp.arange(size)) % size


def write(block, cells, new):
    """Writes new cells [B, K, T, H] into a block [B, K, S, H] at consecutive cells [B or 1, T]."""
    size, count = block.shape[2], new.shape[2]
    if count > size:
        raise ValueError(
            f"a chunk of {count} tokens does not fit a block of {size} cells; use a cache with a "
            f"capacity of at least {count}, or a smaller chunk."
        )

    def row(block, cells, new):  # block [..., K, S, H]
        start = jnp.clip(cells[0], 0, size - count)
        if count < size:  # near the end of the block the slice starts before the first new cell
            shift = cells[0] - start
            cells, new = jnp.roll(cells, shift), jnp.roll(new, shift, new.ndim - 2)
        old = jax.lax.dynamic_slice_in_dim(block, start, count, new.ndim - 2)
        mine = cells == start + jnp.arange(count)
        new = jnp.where(mine[:, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(block, new, start, new.ndim - 2)

    if cells.shape[0] == 1:
        return row(block, cells[0], new)

    def each(b, block):
        one = partial(jax.lax.dynamic_index_in_dim, index=b, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            block, row(one(block), one(cells), one(new)), b, 0
        )

    return jax.lax.fori_loop(0, block.shape[0], each, block)


def write_one(blocks, layer, slots, new):
    """Writes one cell of each sequence, in place.

    Args:
      blocks: [K, S, H] with, in front, an axis of B sequences unless there is one without an axis,
        and an axis of L layers if `layer` is given.
      layer: scalar int32 or None.
      slots: [B or 1] int32.
      new: [B, K, H].
    """
    new = new.astype(blocks.dtype)
    batched = is_batched(blocks, layer)

    def row(b, blocks):
        slot = slots[b if slots.shape[0] > 1 else 0]
        at = corner(b if batched else None, layer, jnp.maximum(slot, 0))
        cell = jax.lax.dynamic_index_in_dim(new, b, keepdims=False)[:, None]
        cell = cell.reshape((1,) * (blocks.ndim - 3) + cell.shape)
        old = jax.lax.dynamic_slice(blocks, at, cell.shape)
        inside = (slot >= 0) & (slot < blocks.shape[-2])
        return jax.lax.dynamic_update_slice(blocks, jnp.where(inside, cell, old), at)

    return jax.lax.fori_loop(0, blocks.shape[0], row, blocks) if batched else row(0, blocks)


def is_batched(blocks, layer) -> bool:
    """Whether blocks, stacked over layers if `layer` is given, have an axis of sequences."""
    return blocks.ndim > (3 if layer is None else 4)


def corner(row, layer, cell):
    """The index of a cell in blocks, for slices; row or layer is None where there is no axis."""
    index = [n for n in (row, layer) if n is not None] + [0, cell, 0]
    return [jnp.asarray(n, jnp.int32) for n in index]


def write_ring(ring, cells, new):
    """The ring after a chunk: each cell holds the newest position that falls on it."""
    size = ring.shape[2]
    last = cells.max(1, keepdims=True)
    source = ring_positions(last, size) - cells[:, :1]
    fresh = (source >= 0) & (last >= 0)
    taken = take(new, jnp.clip(source, 0, new.shape[2] - 1))
    return jnp.where(fresh[:, None, :, None], taken, ring)


def take(block, index):
    """Cells `index` [B or 1, S'] of a block [B, K, S, H] -> [B, K, S', H]."""
    if index.shape[0] == 1:
        return jnp.take(block, index[0], axis=2)
    return jax.vmap(partial(jnp.take, axis=1))(block, index)
