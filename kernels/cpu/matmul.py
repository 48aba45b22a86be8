"""Products of many rows: each sum has the order of `kernels.cpu.product`, at the speed of sums.

A part is 64 columns of some rows. So many terms of these columns as the nearest cache holds are
copied one after the other, in whatever order the matrix lies, and all rows take them before the
next.
"""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.code import Value
from kernels.cpu.tiles import (
    COLUMNS,
    ROW,
    TERMS,
    TYPES,
    add,
    clear,
    copy_columns,
    copy_rows,
    multiply,
    panel_count,
)

_ROWS, _FEWEST_ROWS = 512, 96  # of a part, at most, and at least where there would be too few parts
_PARTS = 8  # for each processor, so that none waits long for the others


def matmul(x, w, block: int, layout="rows", turned=False):
    """x [M, K] @ w [K, N] -> [M, N], in float32.

    Args:
      x: float32; [K, M] if `turned`.
      w: of one of `TYPES`, as [K, N]; in the layout "columns" as [N, K], in "panels" as
        `kernels.cpu.product.panels` has it.
      block: terms of a chain, as in `kernels.cpu.product.products`.
    """
    M = x.shape[1 if turned else 0]
    N = {"rows": w.shape[-1], "columns": len(w), "panels": len(w) * COLUMNS}[layout]
    if 0 in (M, N, x.size):
        return jnp.zeros((M, N), jnp.float32)
    wanted = -(-_PARTS * (os.cpu_count() or 1) // -(-N // COLUMNS))
    groups = max(-(-M // _ROWS), min(wanted, -(-M // _FEWEST_ROWS)))
    kernel = register(_kernel(w.dtype.name, layout, turned))
    call = jax.ffi.ffi_call(kernel, jax.ShapeDtypeStruct((M, N), jnp.float32))
    return call(x, w, block=np.int64(block), rows=np.int64(-(-M // groups)))


@functools.cache
def _kernel(dtype, layout, turned):
    def parts(frame):
        y, rows = frame.result(0), frame.attribute(1)
        return (y.size(0) + (rows - 1)) // rows * panel_count(y.size(1))

    room = lambda frame: room_for(frame.attribute(1))
    run = functools.partial(_part, dtype=dtype, layout=layout, turned=turned)
    name = f"unison_matmul_{dtype}_{layout}" + "_turned" * turned
    return Kernel(name, parts, run, room)


def _part(frame: Frame, part, dtype, layout, turned):
    code = frame.code
    x, w, y = frame.operand(0), frame.operand(1), frame.result(0)
    block, rows = frame.attribute(0), frame.attribute(1)
    M, N, K = y.size(0), y.size(1), x.size(0 if turned else 1)
    panels = panel_count(N)
    column, row = part % panels * COLUMNS, part // panels * rows
    steps = row_step, _ = (4, M * 4) if turned else (K * 4, 4)
    columns_of(
        code,
        (x.address + row * row_step, steps),
        Matrix(w.address, K, N, dtype, layout),
        column,
        (y.address + row * N * 4, code.smaller(M - row, rows)),
        block,
        frame.room,
    )


class Matrix(NamedTuple):
    """A matrix [K, N] of a dtype, as it lies at an address; `layout` as in `matmul`."""

    address: Value
    K: Value
    N: Value
    dtype: str
    layout: str

    def lines(self, column):
        """How terms of 64 columns are copied: (copy, address, step, bytes of a term)."""
        item = TYPES[self.dtype]
        if self.layout == "columns":
            return copy_columns, self.address + column * self.K * item, self.K * item, item
        if self.layout == "panels":
            step = COLUMNS * item
            return copy_rows, self.address + column * self.K * item, step, step
        return copy_rows, self.address + column * item, self.N * item, self.N * item


def columns_of(code, x, w: Matrix, column, y, block, room):
    """Computes up to 64 columns of a product, from `column` on.

    Args:
      code: where it is written.
      x: (address, steps) of rows, as in `tiles.multiply`.
      w: the matrix.
      y: (address, rows): of the first row of the product, and how many rows there are.
      block: terms of a chain.
      room: of `room_for(rows)` bytes.
    """
    x, steps = x
    y, count = y
    copy, source, step, term = w.lines(column)
    columns, term_step = w.N - column, steps[1]
    panel, chains = room, room + TERMS * ROW
    with code.loop(0, w.K, block) as begin:
        end = code.smaller(begin + block, w.K)
        clear(code, chains, count)
        with code.loop(begin, end, TERMS) as k:
            terms = code.smaller(end - k, TERMS)
            copy(code, source + k * term, step, w.dtype, terms, columns, panel)
            multiply(code, x + k * term_step, steps, count, panel, terms, chains, far=True)
        at = y + column * 4
        add(code, chains, at, w.N * 4, count, columns, begin.equals(0))


def room_for(rows):
    """The bytes that a thread needs for so many rows."""
    return (rows + TERMS) * ROW
