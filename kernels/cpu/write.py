"""One new cell of each sequence, copied to where it lies in its block.

XLA updates one slice at a time, so it takes a loop over sequences, of which each turn takes longer
than the copy.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu.call import Frame, Kernel, register


def write(block, layer, cells, new, axis: int):
    """Returns the block with the new cells; it may change in place.

    Args:
      block: [B, ...], or [B, L, ...] where there is a `layer`; of a block's own axes, number `axis`
        are its S cells, with at most one axis before it.
      layer: the one of the L that is meant, or None.
      cells: [B], the cell of each sequence, int32; where there is no such cell, none is written.
      new: [B, ...], in the block's type: its axes, without that of cells.
    """
    if 0 in (block.size, new.size):
        return block
    front = 1 if layer is None else 2
    call = jax.ffi.ffi_call(
        register(_kernel()),
        jax.ShapeDtypeStruct(block.shape, block.dtype),
        input_output_aliases={0: 0},
    )
    return call(
        *(block, new, cells.astype(jnp.int32)),
        jnp.asarray(0 if layer is None else layer, jnp.int32),
        bytes=np.int64(block.dtype.itemsize * math.prod(block.shape[front + axis + 1 :])),
        cells=np.int64(block.shape[front + axis]),
        heads=np.int64(block.shape[front] if axis else 1),
        layers=np.int64(1 if layer is None else block.shape[1]),
    )


@cache
def _kernel():
    return Kernel("unison_write", lambda frame: frame.code.constant(1), _run)


def _run(frame: Frame, part):
    """All sequences: there is too little to copy for two threads."""
    del part
    code = frame.code
    block, (new, cells, layer) = frame.result(0).address, map(frame.operand, (1, 2, 3))
    size, count, heads, layers = (frame.attribute(n) for n in range(4))
    layer = code.small_integer(layer.address)
    with code.loop(0, cells.size(0)) as row:
        cell = code.small_integer(cells.address + row * 4)
        with code.when((cell >= 0) & (cell < count)), code.loop(0, heads) as head:
            place = (((row * layers + layer) * heads + head) * count + cell) * size
            source = new.address + (row * heads + head) * size
            code.call("memcpy", block + place, source, size)
