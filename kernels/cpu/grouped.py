"""Products of groups of rows, each with a matrix of its own, in the order of `kernels.cpu.matmul`.

A part is 64 columns of one group, whose rows it counts up when it begins. Groups without rows cost
nothing, and their matrices are not read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.matmul import Matrix, columns_of, room_for
from kernels.cpu.tiles import COLUMNS, TYPES, panel_count

_ROWS = 512  # at a time


def grouped(x, w, sizes, block: int, layout="rows"):
    """x [M, K] times the matrix of each row's group, w [X, K, N] -> [M, N], in float32.

    Args:
      x: float32; the rows of a group lie together, in the order of the groups.
      w: of one of `TYPES`; [X, N, K] in the layout "columns".
      sizes: [X], int32: the rows of each group. What they do not sum up to are rows of zeros.
      block: terms of a chain, as in `kernels.cpu.product.products`.
    """
    M, N = len(x), w.shape[1 if layout == "columns" else 2]
    if 0 in (M, N, x.size, len(w)):
        return jnp.zeros((M, N), jnp.float32)
    kernel = register(_kernel(w.dtype.name, layout))
    call = jax.ffi.ffi_call(kernel, jax.ShapeDtypeStruct((M, N), jnp.float32))
    return call(x, w, sizes, block=np.int64(block))


def outer(x, y, sizes, block: int):
    """For each group, the transpose of its rows of x [M, K] times those of y [M, N] -> [X, K, N].

    Args:
      x, y: float32.
      sizes, block: as in `grouped`.
    """
    X, K, N = len(sizes), x.shape[1], y.shape[1]
    if 0 in (X, K, N, len(x)):
        return jnp.zeros((X, K, N), jnp.float32)
    call = jax.ffi.ffi_call(register(_OUTER), jax.ShapeDtypeStruct((X, K, N), jnp.float32))
    return call(x, y, sizes, block=np.int64(block))


@functools.cache
def _kernel(dtype, layout):
    run = functools.partial(_part, dtype=dtype, layout=layout)
    groups = lambda frame: frame.operand(2).size(0) + 1  # the last one is of what is left over
    parts = lambda frame: groups(frame) * panel_count(frame.result(0).size(1))
    room = lambda frame: room_for(frame.code.smaller(frame.result(0).size(0), _ROWS))
    return Kernel(f"unison_grouped_{dtype}_{layout}", parts, run, room)


def _rows_of(frame, group):
    """Where the rows of a group begin and end; those after the last group have one, too."""
    code, sizes = frame.code, frame.operand(2)
    size = lambda n: code.small_integer(sizes.address + n * 4)
    begin = code.variable(0)
    with code.loop(0, group) as n:
        begin.set(begin.get() + size(n))
    end = code.variable(frame.operand(0).size(0))
    with code.when(group < sizes.size(0)):
        end.set(begin.get() + size(group))
    return begin.get(), end.get()


def _part(frame: Frame, part, dtype, layout):
    code = frame.code
    x, w, y = frame.operand(0), frame.operand(1), frame.result(0)
    K, N = x.size(1), y.size(1)
    group, column = part // panel_count(N), part % panel_count(N) * COLUMNS
    begin, end = _rows_of(frame, group)
    is_left = group.equals(w.size(0))
    with code.when(is_left):
        _clear(code, y.address, begin, end, column, N)
    with code.when(is_left.negated()), code.loop(begin, end, _ROWS) as m:
        columns_of(
            code,
            (x.address + m * K * 4, (K * 4, 4)),
            Matrix(w.address + group * K * N * TYPES[dtype], K, N, dtype, layout),
            column,
            (y.address + m * N * 4, code.smaller(end - m, _ROWS)),
            frame.attribute(0),
            frame.room,
        )


def _clear(code, y, begin, end, column, N):
    """Sets some rows of up to 64 columns to zero."""
    last = code.smaller(column + COLUMNS, N)
    with code.loop(begin, end) as m, code.loop(column, last) as n:
        code.put(code.number(0.0), y + (m * N + n) * 4)


def _outer_part(frame: Frame, part):
    code = frame.code
    x, y, z = frame.operand(0), frame.operand(1), frame.result(0)
    K, N = z.size(1), z.size(2)
    group, column = part // panel_count(N), part % panel_count(N) * COLUMNS
    begin, end = _rows_of(frame, group)
    matrix = Matrix(y.address + begin * N * 4, end - begin, N, "float32", "rows")
    z = z.address + group * K * N * 4
    with code.loop(0, K, _ROWS) as k:
        rows = code.smaller(K - k, _ROWS)
        with code.when(begin.equals(end)):
            _clear(code, z, k, k + rows, column, N)
        columns_of(
            code,
            (x.address + (begin * K + k) * 4, (4, K * 4)),
            matrix,
            column,
            (z + k * N * 4, rows),
            frame.attribute(0),
            frame.room,
        )


_OUTER = Kernel(
    "unison_grouped_outer",
    lambda frame: frame.result(0).size(0) * panel_count(frame.result(0).size(2)),
    _outer_part,
    lambda frame: room_for(frame.code.smaller(frame.result(0).size(1), _ROWS)),
)
