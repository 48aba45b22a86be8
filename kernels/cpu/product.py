"""Products of few rows with a matrix in panels: each sum has one order, whatever the rows.

A panel is 64 columns, term after term, so that a thread reads memory in one go. Chains of sums stay
in registers for so many terms as a near cache holds, which all rows take before the next.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu import code as words
from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.tiles import COLUMNS, LANES, LINE, SIZES, tile

_IS_WIDE = LANES > words.LANES
_TERMS = 256 if _IS_WIDE else 32
_AHEAD = 32  # terms
# Rows and vectors of columns whose sums fit the registers of any processor. Where that is all of a
# panel's columns, memory is read in one go, which AMD's processors foresee, and Intel's for one
# row: asked for ahead, 8 rows take three quarters of the time there. Elsewhere memory is asked for.
_TILES = ((6, 4), (4, 4), (2, 4), (1, 4)) if _IS_WIDE else ((4, 2), (2, 4), (1, 8))
_FORESEES = words.is_amd()


def panels(w):
    """A matrix w [..., K, N] -> [..., N / 64, K, 64], filled up with zeros."""
    *front, K, N = w.shape
    w = jnp.pad(w, [(0, 0)] * (len(front) + 1) + [(0, -N % COLUMNS)])
    return w.reshape(*front, K, -1, COLUMNS).swapaxes(-3, -2)


def matrix(w):
    """The matrix [..., K, N or more] of which `panels` made w."""
    *front, count, K, columns = w.shape
    return w.swapaxes(-3, -2).reshape(*front, K, count * columns)


def products(x, ws, block: int, scales=()):
    """x [M, K] times matrices in panels ws [P, K, 64] -> [[M, 64 P], ...], in float32.

    Each number is the sum of chains of `block` terms, added one after the other; a chain begins at
    zero and takes its terms in order, by multiply-adds that round once. Matrices of one call share
    the threads, which wait for one another only at its end.

    Args:
      x: float32.
      ws: of one of `TYPES`, or int8.
      scales: of int8, float32 [P, K / block, 64] for each matrix: a factor of each chain.
    """
    results = [jax.ShapeDtypeStruct((len(x), len(w) * COLUMNS), jnp.float32) for w in ws]
    # The second half of the results is room for the chains.
    call = jax.ffi.ffi_call(register(_kernel(ws[0].dtype.name)), results * 2)
    static = {"block": np.int64(block), "matrices": np.int64(len(ws))}
    return call(x, *ws, *scales, **static)[: len(ws)]


@functools.cache
def _kernel(dtype):
    run = functools.partial(_panel, dtype=dtype)
    return Kernel(f"unison_product_{dtype}", _panels, run, in_turn=True)


def _panels(frame: Frame):
    """How many panels all matrices have."""
    count = frame.code.variable(0)
    with frame.code.loop(0, frame.attribute(1)) as n:
        count.set(count.get() + frame.operand(n + 1).size(0))
    return count.get()


def _panel(frame: Frame, part, dtype):
    """The columns of one panel."""
    code = frame.code
    block, matrices = (frame.attribute(n) for n in range(2))
    matrix, left = code.variable(0), code.variable(part)
    size = lambda: frame.operand(matrix.get() + 1).size(0)
    with code.repeat(lambda: left.get() >= size()):
        left.set(left.get() - size())
        matrix.set(matrix.get() + 1)
    matrix, panel = matrix.get(), left.get()
    x, w = frame.operand(0), frame.operand(matrix + 1)
    M, K, N = x.size(0), x.size(1), w.size(0) * COLUMNS
    term = COLUMNS * SIZES[dtype]  # bytes
    here = panel * (4 * COLUMNS)
    total, chain = (frame.result(n).address + here for n in (matrix, matrix + matrices))
    w = w.address + panel * K * term
    with code.loop(0, K, block) as begin:
        end = code.smaller(begin + block, K)
        _each(code, M, N, lambda n, at: code.put(code.splat(code.number(0.0), LANES), chain + at))
        with code.loop(begin, end, _TERMS) as k:
            terms, ahead = code.smaller(end - k, _TERMS), w + (k + _AHEAD) * term
            row = code.variable(0)
            for rows, vectors in _TILES:
                width = vectors * LANES
                with code.repeat(lambda rows=rows: row.get() + rows <= M):
                    m = row.get()
                    for column in range(0, COLUMNS, width):
                        # Each column's turn asks for its share of the terms to come.
                        asks = width < COLUMNS or (rows > 1 and not _FORESEES)
                        lines = -(-width * SIZES[dtype] // LINE) if asks else 0
                        share = ahead + terms * (column * SIZES[dtype])
                        tile(
                            code,
                            (rows, vectors),
                            (x.address + (m * K + k) * 4, K * 4, 4),
                            w + k * term + column * SIZES[dtype],
                            terms,
                            chain + (m * N + column) * 4,
                            step=N * 4,
                            dtype=dtype,
                            ahead=[(share + n * LINE, lines * LINE) for n in range(lines)],
                        )
                    row.set(m + rows)
        sums = lambda n, at: code.vector(chain + at, lanes=LANES)
        if dtype == "int8":
            scale = frame.operand(matrix + matrices + 1)
            scale = scale.address + (panel * scale.size(1) + begin // block) * (4 * COLUMNS)
            sums = lambda n, at: (
                code.vector(chain + at, lanes=LANES) * code.vector(scale + 4 * n, lanes=LANES)
            )
        with code.when(begin.equals(0)):
            _each(code, M, N, lambda n, at: code.put(sums(n, at), total + at))
        with code.when(begin > 0):
            add = lambda n, at: code.put(
                code.vector(total + at, lanes=LANES) + sums(n, at), total + at
            )
            _each(code, M, N, add)


def _each(code, M, N, write):
    """`write(column, where)` for the vectors of the panel's columns in all rows."""
    with code.loop(0, M) as m:
        for n in range(0, COLUMNS, LANES):
            write(n, m * N * 4 + n * 4)
