"""Products of many rows with 64 columns, whose sums stay in registers: what kernels are made of.

Terms of the columns lie in a panel, [terms, 64] in float32, which the nearest cache holds while all
rows take them. `copy_rows` and `copy_columns` fill it.
"""

import contextlib

from kernels.cpu import code as words
from kernels.cpu.code import Code

COLUMNS = 64
TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of floats, in bytes
SIZES = TYPES | {"int8": 1}
LANES = words.widest()
ROW = 4 * COLUMNS  # bytes of a row of a panel
LINE = 64  # bytes of a line of a cache
TERMS = 128 if LANES > words.LANES else 64  # of a panel
# Rows and vectors of columns whose sums fit the registers.
_TILES = ((6, 4), (2, 4), (1, 4)) if LANES > words.LANES else ((6, 2), (2, 2), (1, 2))


def panel_count(columns):
    """How many panels hold so many columns."""
    return (columns + (COLUMNS - 1)) // COLUMNS


def multiply(code: Code, x, steps, count, panel, terms, sums, step=ROW, far=False):
    """Continues the chains of so many rows with 64 columns by the terms of a panel.

    Args:
      code: where it is written.
      x: the address of the first row's first term; the number of bytes to the next row and to the
        next term are `steps`.
      count: of rows.
      panel: the address of a panel.
      terms: how many it has.
      sums: the address of the chains, `step` bytes from row to row.
      far: whether x lies in no near cache, so that the next rows have to be asked for.
    """
    row_step, term_step = steps
    done = code.variable(0)
    for rows, vectors in _TILES:
        with code.repeat(lambda rows=rows: done.get() + rows <= count):
            m = done.get()
            for first in range(0, ROW, 4 * LANES * vectors):
                at = x + code.constant(row_step) * m
                asks = _next_rows(code, at, steps, rows) if far and first == 0 else {}
                here, there = (at, row_step, term_step), sums + m * step + first
                tile(code, (rows, vectors), here, panel + first, terms, there, step, **asks)
            done.set(m + rows)


def _next_rows(code, x, steps, rows):
    """How a tile of so many rows at x asks for what the next one takes of x."""
    row_step, term_step = steps
    if term_step == 4:  # lines of a row, too few in turn to be foreseen: 1.1 to 1.3 times as fast
        next_ones = [x + code.constant(row_step) * (rows + n) for n in range(rows)]
        return {"ahead": [(at, term_step) for at in next_ones], "every": LINE // 4}
    return {"ahead": [(x + LINE, term_step)]}


def tile(code: Code, shape, x, panel, terms, sums, step, dtype="float32", ahead=(), every=1):
    """Continues the chains of some rows and vectors of columns: `shape` says of how many.

    Args:
      code: where it is written.
      x: (address, row_step, term_step).
      panel: the address of the first column, in rows of 64 numbers of a dtype.
      terms: how many.
      sums: the address of the chains, `step` bytes from row to row.
      dtype: of the panel.
      ahead: (address, step) of memory that is needed soon: one line of it is asked for at a time.
      every: so many terms ask once.
    """
    rows, vectors = shape
    x, row_step, term_step = x
    size = SIZES[dtype]
    places = [
        [sums + code.constant(step) * m + 4 * LANES * v for v in range(vectors)]
        for m in range(rows)
    ]
    held = [[code.variable(code.vector(at, lanes=LANES)) for at in row] for row in places]
    with code.loop(0, terms, every) as begin:
        for address, line_step in ahead:
            code.prefetch(address + begin * line_step)
        turn = code.loop(begin, code.smaller(begin + every, terms))
        with turn if every > 1 else contextlib.nullcontext(begin) as k:
            here = panel + k * (COLUMNS * size)
            ws = [code.vector(here + v * LANES * size, dtype, LANES) for v in range(vectors)]
            for m in range(rows):
                at = x + code.constant(row_step) * m + k * term_step
                one = code.splat(code.float(at), LANES)
                for v in range(vectors):
                    held[m][v].set(code.fma(one, ws[v], held[m][v].get()))
    for variables, row in zip(held, places, strict=True):
        for variable, at in zip(variables, row, strict=True):
            code.put(variable.get(), at)


def clear(code: Code, at, count, step=ROW):
    """Sets the chains of so many rows to zero."""
    with code.loop(0, count) as m:
        for n in range(0, ROW, 4 * LANES):
            code.put(code.splat(code.number(0.0), LANES), at + m * step + n)


def copy_rows(code: Code, w, step, dtype, terms, columns, panel):
    """Fills a panel with `terms` rows of up to 64 columns, `step` bytes from row to row at w.

    Columns that are not there are zeros.
    """
    item = TYPES[dtype]
    with code.loop(0, terms) as k:
        row, to = w + k * step, panel + k * ROW
        with code.when(columns >= COLUMNS):
            for c in range(0, COLUMNS, LANES):
                code.put(code.vector(row + c * item, dtype, LANES), to + 4 * c)
        with code.when(columns < COLUMNS):
            with code.loop(0, columns) as c:
                code.put(code.float(row + c * item, dtype), to + c * 4)
            with code.loop(columns, COLUMNS) as c:
                code.put(code.number(0.0), to + c * 4)


def copy_columns(code: Code, w, step, dtype, terms, columns, panel):
    """The same where each column's terms lie in a row: squares are turned over in registers."""
    item = TYPES[dtype]
    at = lambda c, k: w + c * step + k * item
    to = lambda c, k: panel + k * ROW + c * 4
    columns = code.smaller(columns, COLUMNS)
    whole, square = columns - columns % LANES, terms - terms % LANES
    with code.loop(0, whole, LANES) as c, code.loop(0, square, LANES) as k:
        rows = [code.vector(at(c + m, k), dtype, LANES) for m in range(LANES)]
        for m, turned in enumerate(code.transposed(rows)):
            code.put(turned, to(c, k + m))
    with code.loop(0, whole) as c, code.loop(square, terms) as k:
        code.put(code.float(at(c, k), dtype), to(c, k))
    with code.loop(whole, columns) as c, code.loop(0, terms) as k:
        code.put(code.float(at(c, k), dtype), to(c, k))
    with code.loop(columns, COLUMNS) as c, code.loop(0, terms) as k:
        code.put(code.number(0.0), to(c, k))


def add(code: Code, chains, y, step, count, columns, is_first):
    """Adds chains to the sums [count, columns] at y; the first ones are the sums."""

    def write(adds):
        with code.loop(0, count) as m:
            here, there = chains + m * ROW, y + m * step
            with code.when(columns >= COLUMNS):
                for c in range(0, COLUMNS, LANES):
                    new = code.vector(here + 4 * c, lanes=LANES)
                    old = code.vector(there + 4 * c, lanes=LANES)
                    code.put(old + new if adds else new, there + 4 * c)
            with code.when(columns < COLUMNS), code.loop(0, columns) as c:
                new, old = code.float(here + c * 4), code.float(there + c * 4)
                code.put(old + new if adds else new, there + c * 4)

    with code.when(is_first):
        write(False)
    with code.when(is_first.negated()):
        write(True)
