"""Gradients of attention of many queries on a CPU, from the log-sum-exp of the forward pass.

A part of it is one key head of one sequence. For some queries, with all query heads that share the
key head, and 64 cells at a time, scores and their gradients stay in the nearest cache, and five
products follow one another. What adds up over queries lies in memory of the thread until the end.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cpu import tiles
from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.code import LANES, Code, Value
from kernels.cpu.functions import exp
from kernels.cpu.queries import Queries, position_operands
from kernels.cpu.scores import Bends, optional
from kernels.cpu.tiles import (
    COLUMNS,
    ROW,
    TYPES,
    clear,
    copy_columns,
    copy_rows,
    multiply,
    panel_count,
)
from kernels.operands import Where
from kernels.options import Options

_ROWS = 96  # queries times heads at a time


def gradients(q, keys, values, dz, lse, delta, where: Where, alibi, options: Options):
    """The gradients of q, keys and values, in float32.

    Args:
      q, dz: [B, T, N, H] and [B, T, N, Hv].
      keys, values: [B, K, S, H] and [B, K, S, Hv].
      lse: the log-sum-exp [B, T, N].
      delta: [B, T, N], what is taken from the gradient of each weight.
      where: with cells that hold their own positions.
      alibi: the slopes [N], or None.
      options: scale, window and soft cap.
    """
    (B, T, N, H), (K, S), Hv = q.shape, keys.shape[1:3], values.shape[-1]
    wide = lambda x: x.astype(jnp.float32)
    shapes = (B, T, N, H), (B, K, S, H), (B, K, S, Hv)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    kernel = register(_kernel(keys.dtype.name, values.dtype.name))
    call = jax.ffi.ffi_call(kernel, results, vmap_method="sequential")
    dq, dkeys, dvalues = call(
        *(wide(q) * options.scale, keys, values, wide(dz), wide(lse), wide(delta)),
        *position_operands(where, B, T),
        *map(optional, (options.soft_cap, alibi)),
        queries=np.int64(max(1, _ROWS * K // N)),
        window=np.int64(options.window or 2**31),
    )
    return dq * options.scale, dkeys, dvalues


@cache
def _kernel(key_type, value_type):
    heads = lambda frame: frame.operand(1).size(0) * frame.operand(1).size(1)
    run = partial(_part, key_type=key_type, value_type=value_type)
    return Kernel(f"unison_gradients_{key_type}_{value_type}", heads, run, _room)


class _Sizes(NamedTuple):
    """What a call is about."""

    T: Value
    N: Value
    K: Value
    S: Value
    H: Value
    Hv: Value
    queries: Value
    window: Value

    @property
    def group(self):
        """Query heads of a key head."""
        return self.N // self.K

    @property
    def rows(self):
        """Queries times heads at a time, at most."""
        return self.queries * self.group


def _sizes(frame):
    q, values = frame.operand(0), frame.operand(2)
    sizes = (q.size(1), q.size(2), values.size(1), values.size(2), q.size(3), values.size(3))
    return _Sizes(*sizes, frame.attribute(0), frame.attribute(1))


def _room(frame):
    s = _sizes(frame)
    held = s.rows * (panel_count(s.H) * 2 + panel_count(s.Hv) + 2) + COLUMNS
    return (held + (s.S + COLUMNS) * (panel_count(s.H) + panel_count(s.Hv))) * ROW


def _part(frame: Frame, part, key_type, value_type):
    code, s = frame.code, _sizes(frame)
    q, keys, values, dz, lse, delta, positions, starts, *bends = map(frame.operand, range(10))
    row, head = part // s.K, part % s.K
    block, cells = part * s.S, panel_count(s.S) * COLUMNS
    of_head = (row * s.T, s.N, s.group, head * s.group, positions, starts)
    panel = frame.room
    scores, slopes = panel + COLUMNS * ROW, panel + (s.rows + COLUMNS) * ROW
    held = slopes + s.rows * ROW
    upstream = held + s.rows * panel_count(s.H) * ROW
    dq = upstream + s.rows * panel_count(s.Hv) * ROW
    dkeys = dq + s.rows * panel_count(s.H) * ROW
    part = _Part(
        code,
        s,
        Queries(code, s.S, s.window, *of_head),
        _Numbers(keys.address + block * s.H * TYPES[key_type], s.H, key_type),
        _Numbers(values.address + block * s.Hv * TYPES[value_type], s.Hv, value_type),
        (lse.address, delta.address),
        Bends(code, *bends),
        (panel, scores, slopes),
        _Sums(held, s.rows, s.H),
        _Sums(upstream, s.rows, s.Hv),
        _Sums(dq, s.rows, s.H),
        _Sums(dkeys, cells, s.H),
        _Sums(dkeys + cells * panel_count(s.H) * ROW, cells, s.Hv),
    )
    for sums in (part.dkeys, part.dvalues):
        clear(code, sums.address, cells * panel_count(sums.columns))
    with code.loop(0, s.T, s.queries) as begin:
        end = code.smaller(begin + s.queries, s.T)
        with part.queries.documents(begin, end) as document:
            part.add(*document, q.address, dz.address, frame.result(0).address)
    for n, sums in ((1, part.dkeys), (2, part.dvalues)):
        where = frame.result(n).address + block * sums.columns * 4
        sums.copy(code, s.S, lambda m, w=where, c=sums.columns: w + m * c * 4, back=True)


class _Numbers(NamedTuple):
    """Rows of keys or values as they lie."""

    address: Value
    columns: Value
    dtype: str

    @property
    def step(self):
        """Bytes of a row."""
        return self.columns * TYPES[self.dtype]


class _Sums(NamedTuple):
    """Rows in panels of 64 columns, one panel after the other."""

    address: Value
    rows: Value
    columns: Value

    def panel(self, column):
        """The panel that begins with a column."""
        return self.address + column // COLUMNS * self.rows * ROW

    def copy(self, code, count, place, back=False):
        """Copies so many rows from where `place(row)` says, or `back` to there."""
        several = self.columns - self.columns % LANES

        def move(load, m, h):
            here, there = self.panel(h) + m * ROW + h % COLUMNS * 4, place(m) + h * 4
            code.put(load(here), there) if back else code.put(load(there), here)

        with code.loop(0, count) as m:
            with code.loop(0, several, LANES) as h:
                move(code.vector, m, h)
            with code.loop(several, self.columns) as h:
                move(code.float, m, h)


class _Part(NamedTuple):
    """One part: its operands, its memory, and the code of what is done for some queries."""

    code: Code
    sizes: _Sizes
    queries: Queries
    keys: _Numbers
    values: _Numbers
    of_queries: tuple  # the log-sum-exp and delta
    bends: Bends
    room: tuple  # a panel, scores and their gradients
    q: _Sums
    dz: _Sums
    dq: _Sums
    dkeys: _Sums
    dvalues: _Sums

    def add(self, begin, end, start, q, dz, dq):
        """What queries begin <= t < end add, whose document begins at cell `start`."""
        code, s = self.code, self.sizes
        count = (end - begin) * s.group
        at = lambda base, width: lambda n: base + self.queries.place(begin, n) * width * 4
        for sums, base in ((self.q, q), (self.dz, dz)):
            clear(code, sums.address, s.rows * panel_count(sums.columns))
            sums.copy(code, count, at(base, sums.columns))
        clear(code, self.dq.address, s.rows * panel_count(s.H))
        first, stop = self.queries.span(begin, end, start)
        with code.loop(first // COLUMNS * COLUMNS, stop, COLUMNS) as cell:
            some = code.smaller(stop - cell, COLUMNS)
            one, after = self.queries.readers(begin, end, start, cell, cell + some)
            with code.when(one < after):
                here = (one - begin) * s.group, (after - one) * s.group
                self._cells(one, start, *here, cell, some)
        self.dq.copy(code, count, at(dq, s.H), back=True)

    def _cells(self, begin, start, row, count, cell, some):
        """What some cells from `cell` on add, by so many rows of queries from `row` on."""
        code, skipped = self.code, row * ROW
        panel, scores, slopes = self.room
        by_row, by_cell = (ROW, 4), (4, ROW)
        for x, held, result in ((self.q, self.keys, scores), (self.dz, self.values, slopes)):
            clear(code, result, count)
            with code.loop(0, x.columns, COLUMNS) as h:
                terms = code.smaller(x.columns - h, COLUMNS)
                at = held.address + cell * held.step + h * TYPES[held.dtype]
                copy_columns(code, at, held.step, held.dtype, terms, some, panel)
                multiply(code, x.panel(h) + skipped, by_row, count, panel, terms, result)
        with code.loop(0, count) as n:
            self._weigh(begin, n, start, cell, scores + n * ROW, slopes + n * ROW)
        for x, y, sums in ((scores, self.dz, self.dvalues), (slopes, self.q, self.dkeys)):
            with code.loop(0, y.columns, COLUMNS) as h:
                to = sums.panel(h) + cell * ROW
                multiply(code, x, by_cell, some, y.panel(h) + skipped, count, to)
        with code.loop(0, self.keys.columns, COLUMNS) as h:
            at = self.keys.address + cell * self.keys.step + h * TYPES[self.keys.dtype]
            left = self.keys.columns - h
            copy_rows(code, at, self.keys.step, self.keys.dtype, some, left, panel)
            multiply(code, slopes, by_row, count, panel, some, self.dq.panel(h) + skipped)

    def _weigh(self, begin, n, start, cell, scores, slopes):
        """Makes scores of a query head weights, and the gradients of weights those of scores."""
        code, s = self.code, self.sizes
        first, last = self.queries.seen(begin + n // s.group, start)
        place = self.queries.place(begin, n) * 4
        lse, delta = (code.float(x + place) for x in self.of_queries)
        delta = code.variable(delta)
        with code.when(self.bends.has_cap()):
            self.bends.cap_gradients(scores, slopes, COLUMNS, delta.get())
            delta.set(code.number(0.0))
        with code.when(self.bends.has_slopes()):
            head = self.queries.head + n % s.group
            distance = self.queries.position(begin + n // s.group) - cell
            self.bends.lean(scores, 0, COLUMNS, head, distance)
        splat, vector = (partial(f, lanes=tiles.LANES) for f in (code.splat, code.vector))
        lse, delta, zeros = map(splat, (lse, delta.get(), code.number(0.0)))
        low, high = (splat(code.narrow(x - cell)) for x in (first, last))
        for c in range(0, COLUMNS, tiles.LANES):
            places = code.counted(code.constant(c), tiles.LANES)
            seen = (places >= low) & (places < high)
            weight = exp(code, vector(scores + 4 * c) - lse)
            slope = weight * (vector(slopes + 4 * c) - delta)
            code.put(code.select(seen, weight, zeros), scores + 4 * c)
            code.put(code.select(seen, slope, zeros), slopes + 4 * c)
