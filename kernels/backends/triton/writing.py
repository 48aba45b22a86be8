"""A chunk of each sequence written into its block, without a loop over sequences."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.backends.triton.adapter import call
from kernels.backends.triton.launches import launch, width
from kernels.backends.triton.write_kernel import write_kernel
from kernels.cells import write_transposed
from kernels.tracing.linear import linear_call
from kernels.tracing.partition import foldable
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
    # As the tokens made them: what turned them around before is no operation any more.
    (block,) = foldable(partial(_write, on), AXES, ("bksh",))(new.swapaxes(1, 2), block, cells)
    return block


def _write(on, new, block, cells):
    B, K, S, H = block.shape
    T = cells.shape[1]
    tile = launch("write", on, H, block.dtype)
    return call(
        write_kernel,
        block,
        cells,
        new,
        S,
        T,
        outputs=[jax.ShapeDtypeStruct(block.shape, block.dtype)],
        programs=B * K * -(-T // tile.block_m),
        launch=tile,
        architecture=on,
        aliases={0: 0},
        K=K,
        H=H,
        WIDTH=width(H),
    )
