"""A chunk of each sequence written into its block, without a loop over sequences."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.backends.triton.adapter import call
from kernels.backends.triton.launches import launch, width
from kernels.backends.triton.write_kernel import write_kernel
from kernels.blocks import Blocks
from kernels.cells import write_transposed
from kernels.tracing.linear import linear_call
from kernels.tracing.partition import foldable, split_by_rows_and_heads
from kernels.tracing.target import architecture

# As `kernels.tracing.partition` wants them: first the heads of the new cells, as "query heads".
AXES = ("btnh", "bksh", "bt")


def write(block, cells, new, *, on: int | None = None):
    """Does what `kernels.cells.write` does, for sequences that have cells of their own.

    Args:
      block: [B, K, S, H]; written in place, if this is its last use.
      cells: [B, T] int32, with T up to S.
      new: [B, K, T, H].
      on: as in `kernels.backends.triton.decode`.

    Returns:
      The block with the new cells, which has gradients for block and new.

    Raises:
      NotImplementedError: the sequences share their cells, which a slice update does better; there
        are more tokens than cells; or the head size, dtype or architecture has no launch.
    """
    on = architecture() if on is None else on
    if cells.shape[0] == 1 or cells.shape[1] > block.shape[2]:
        raise NotImplementedError("a slice update writes this in place, or says why it cannot.")
    launch("write", on, block.shape[3], block.dtype)
    run = partial(_run, on)
    return linear_call(run, write_transposed, cells.astype(jnp.int32), (block, new), results=block)


def _run(on, cells, operands):
    block, new = operands
    write = lambda new, block, cells: [_write(on, new, block, cells)]
    # As the tokens made them: what turned them around before is no operation any more.
    (block,) = foldable(write, AXES, ("bksh",))(new.swapaxes(1, 2), block, cells)
    return block


def write_one(blocks: Blocks, cells, cell, on: int):
    """Does what `kernels.cells.write_one` does, for blocks [K, S, H].

    on: as in `write`.
    """
    axes = "b" * blocks.batched + "l" * (blocks.layer is not None) + "ksh"
    cells = jnp.broadcast_to(cells, (len(cell[0]),))[:, None]

    def one(block, new):
        write = lambda new, block, cells, layer: [_write(on, new, block, cells, layer)]
        operands = new.astype(block.dtype), block, cells, blocks.layer
        return split_by_rows_and_heads(write, operands, ("btnh", axes, "bt", ""), (axes,))[0]

    return tuple(map(one, blocks.arrays, cell))


def _write(on, new, block, cells, layer=None):
    *_, K, S, H = block.shape
    B, T = cells.shape
    tile = launch("write", on, H, block.dtype)
    (block,) = call(
        write_kernel,
        block,
        jnp.int32(0) if layer is None else layer,
        cells,
        new,
        S,
        T,
        outputs=[jax.ShapeDtypeStruct(block.shape, block.dtype)],
        programs=B * K * -(-T // tile.block_m),
        launch=tile,
        architecture=on,
        aliases={0: 0},
        L=1 if layer is None else block.shape[-4],
        K=K,
        H=H,
        WIDTH=width(H),
    )
    return block
