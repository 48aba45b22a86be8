"""The instruction on keys and values: write the cells of a chunk, then read up to each of them.

A block is a pair of keys [K, S, H] and values [K, S, Hv]. A block of `window` cells is a ring,
position p in cell p % window.

`chunk` runs any number of tokens: one slice update and one attention, with gradients. `decode` runs
one token: it changes one cell in place and reads tiles of the block where it lies, so there is no
scatter and no copy of a block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.backends import choice
from kernels.blocks import Blocks
from kernels.cells import consecutive, in_order, is_ring, write_last
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.partition import vary_like

__all__ = ["Shared", "chunk", "decode", "read"]


def chunk(
    block,
    i,
    cell,
    q,
    shared: Shared,
    *,
    options: Options,
    packed: bool,
    backend: str,
    keys_values: Callable = tuple,
    split: Callable = lambda read, size: read,
):
    """Writes T new cells of each sequence into its block, then reads for each of them.

    Args:
      block: (keys [B, K, S, H], values [B, K, S, Hv]); or any arrays [B, K, S, ...] of which
        `keys_values` makes the two.
      i: [B or 1, T] int32: consecutive positions; padding is -1 and comes last in a row. A padding
        token writes nothing and reads nothing.
      cell: (k [B, T, K, H], v [B, T, K, Hv]), or whatever else the block holds. It is written in
        the dtypes of the block.
      q: [B, T, N, H].
      shared: the sinks and the slopes of ALiBi.
      options: scale, window and soft cap; static.
      packed: whether positions may begin again at 0, where another document begins; static. A token
        then sees only its own document, and the block that is returned holds the last document, in
        cells 0..i[-1]; what its other cells hold is undefined. Except in a ring, i[0] + T must not
        exceed S; if it does, what is read is nan.
      backend: the name of a backend, or "auto"; static.
      keys_values: a function that maps a block's arrays to (keys, values).
      split: takes a function of (keys, values, shared, q, i, starts), which reads for any of the T
        queries, and T; it may have several devices each run it for some of them.

    Returns:
      (block, z): the block with the new cells, and z [B, T, N, Hv] in q's dtype. Both have
      gradients for block, cell, q and sinks, in the modes of differentiation that the backend has.

    Raises:
      ValueError: there are more tokens than cells, and the block is not a ring.
      NotImplementedError: the backend cannot do it, for the reason given.
    """
    operands = block, i, cell, q, shared
    block, i, cell, q, shared = vary_like(operands, operands)
    new = jax.tree.map(lambda x, old: x.swapaxes(1, 2).astype(old.dtype), cell, block)
    size = block[0].shape[2]

    def read(keys, values, shared, q, positions, starts):
        where = Where(positions, q_starts=starts)
        return choice.attend(backend, q, keys, values, where, shared, options=options)[0]

    def attend(block, positions, starts=None):
        own = q, positions, starts
        return split(read, q.shape[1])(*keys_values(block), shared, *own)

    # What is written and what is read are apart: where nobody uses one, XLA drops it.
    def write(cells):
        return jax.tree.map(lambda x, new: choice.write(backend, x, cells, new), block, new)

    if is_ring(options, size):
        return _write_last(block, i, new, ring=True), attend(*_unrolled(block, i, new))
    if packed:
        cells = consecutive(i[:, :1], i)
        written, starts = write(cells), cells - i
        z = attend(written, cells, starts)
        fits = cells.max(1) < size
        z = jnp.where(fits[:, None, None, None], z, jnp.nan)
        return _write_last(block, i, new, ring=False), z
    block = write(i)
    return block, attend(block, i)


def _write_last(block, i, new, *, ring):
    return jax.tree.map(lambda x, new: write_last(x, i, new, ring=ring), block, new)


def _unrolled(ring, i, new):
    """A ring in the order of positions, then the chunk.

    A chunk may overwrite cells that its own first tokens still see, so the read is from the ring as
    it was. Its cells before position 0 are empty: no document begins there.
    """
    together = lambda x, new: jnp.concatenate([in_order(x, i[:, :1]), new], axis=2)
    cells = consecutive(ring[0].shape[2], i)
    return jax.tree.map(together, ring, new), cells, cells - i


def decode(blocks: Blocks, i, cell, q, shared: Shared, *, options: Options, backend: str):
    """Writes one new cell of each sequence in place, then reads; without a gradient.

    Args:
      blocks: where the blocks (keys, values) of the sequences lie.
      i: [B or 1, 1] int32, the position of each token; -1 is padding, as in `chunk`.
      cell: (k [B, 1, K, H], v [B, 1, K, Hv]), written in the blocks' dtypes.
      q: [B, 1, N, H].
      shared, options, backend: as in `chunk`.

    Returns:
      (arrays, z): the arrays of the blocks with the new cells, and z [B, 1, N, Hv].

    Raises:
      NotImplementedError: the backend has no such way, or none for this case; `chunk` may have one.
    """
    operands = blocks, i, cell, q, shared
    operands = vary_like(operands, operands)

    def one_token(module):
        choice.check_exact(module, options)
        if not hasattr(module, "decode"):
            raise NotImplementedError("it has no way of its own to run one token.")
        return module.decode(*operands, options=options)

    return choice.run(backend, one_token)


def read(blocks: Blocks, i, q, shared: Shared, *, options: Options, backend: str):
    """Reads a block that already holds the cell of each sequence's token; without a gradient.

    Args:
      blocks, i, q, shared, options, backend: as in `decode`.

    Returns:
      z [B, 1, N, Hv].

    Raises:
      NotImplementedError: the backend cannot do it, for the reason given.
    """
    operands = blocks, i, q, shared
    blocks, i, q, shared = vary_like(operands, operands)

    def one_token(module):
        choice.check_exact(module, options)
        if hasattr(module, "read"):
            return module.read(blocks, i, q, shared, options=options)
        block, size = blocks.take(), blocks.arrays[0].shape[-2]
        where = Where(i)
        if is_ring(options, size):
            block = jax.tree.map(lambda x: in_order(x, i + 1), block)
            cell = consecutive(size - 1, i)
            where = Where(cell, q_starts=cell - i)
        return module.attend(q, *block, where, shared, options=options)[0]

    return choice.run(backend, one_token)
