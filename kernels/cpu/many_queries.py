"""Attention of many queries on blocks as they lie, in the order of `kernels.exact`.

A part of it is one key head of one sequence and some queries, with all query heads that share the
key head. Their scores are products with the keys of 64 cells at a time, and are kept in memory of
the thread until the softmax is known; what is read is a product with the values. Queries of one
part that belong to different documents take turns, since tiles begin where a document does.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.blocks import Blocks
from kernels.cpu.call import Buffer, Frame, Kernel, register
from kernels.cpu.code import LANES, Code, Value
from kernels.cpu.functions import exp
from kernels.cpu.queries import Queries, position_operands
from kernels.cpu.scores import Bends, optional
from kernels.cpu.softmax import TILE, largest, weights
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
from kernels.dot import has_kernel
from kernels.exact import attention as exact
from kernels.exact import functions
from kernels.exact.sums import rounded
from kernels.operands import Shared, Where
from kernels.options import Options

_ROWS = 96  # queries times heads of a part
_SCORES = 2**21  # that a thread keeps at a time, if rows are few enough for it
_LOWEST = -3.4e38


def can_attend(q, blocks: Blocks, where: Where, shared: Shared, options: Options) -> bool:
    """Whether `attend` does this: floats of few types in cells that hold their own positions."""
    if not has_kernel() or where.kv_positions is not None:
        return False
    arrays = jax.tree.leaves(blocks.arrays)
    (S, H), Hv = arrays[0].shape[-2:], arrays[-1].shape[-1]
    fits = len(arrays) == 2 and q.shape[1] > 1 and Hv % LANES == 0
    fits = fits and all(x.dtype.name in TYPES for x in (*arrays, q))
    return fits and (not options.exact or exact.is_in_order(S, H, Hv))


def attend(q, blocks: Blocks, where: Where, shared: Shared, options: Options):
    """`attend` of a backend on blocks as they lie, without a gradient: (z, lse)."""
    (B, T, N, _), (keys, values) = q.shape, blocks.arrays
    K, S, Hv = *keys.shape[-3:-1], values.shape[-1]
    scaled = rounded(q.astype(jnp.float32) * options.scale)
    layer = jnp.zeros((), jnp.int32) if blocks.layer is None else blocks.layer
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, T, N, Hv), *[(B, T, N)] * 2)]
    kernel = register(_kernel(keys.dtype.name, values.dtype.name))
    call = jax.ffi.ffi_call(kernel, results, vmap_method="sequential")
    z, peak, whole = call(
        *(scaled, keys, values, *position_operands(where, B, T)),
        layer.astype(jnp.int32),
        *map(optional, (shared.sinks, options.soft_cap, shared.alibi)),
        cells=np.int64(S),
        heads=np.int64(K),
        layers=np.int64(1 if blocks.layer is None else keys.shape[-4]),
        queries=np.int64(max(1, min(_ROWS, _SCORES // max(1, S)) * K // N)),
        window=np.int64(options.window or 2**31),
    )
    empty = whole == 0
    lse = jnp.where(empty, -jnp.inf, peak + functions.log(jnp.where(empty, 1, whole)))
    return rounded(z.astype(q.dtype)), lse


@cache
def _kernel(key_type, value_type):
    run = partial(_part, key_type=key_type, value_type=value_type)
    return Kernel(f"unison_attend_{key_type}_{value_type}", _parts, run, _room)


class _Sizes(NamedTuple):
    """What a call is about, and where a thread keeps what."""

    T: Value
    N: Value
    H: Value
    Hv: Value
    cells: Value
    heads: Value
    layers: Value
    queries: Value
    window: Value

    @property
    def group(self):
        """Query heads of a key head."""
        return self.N // self.heads

    @property
    def rows(self):
        """Of a part, at most."""
        return self.queries * self.group

    @property
    def score_step(self):
        """Bytes of a row of scores: not a power of two, so that rows do not share cache lines."""
        return ((self.cells + (TILE - 1)) // TILE * TILE + (TILE + COLUMNS + LANES)) * 4

    @property
    def sum_step(self):
        """Bytes of a row of what is read."""
        return panel_count(self.Hv) * ROW


def _sizes(frame: Frame):
    q, read = frame.operand(0), frame.result(0)
    attributes = (frame.attribute(n) for n in range(5))
    return _Sizes(q.size(1), q.size(2), q.size(3), read.size(3), *attributes)


def _parts(frame):
    s = _sizes(frame)
    tiles = (s.T + (s.queries - 1)) // s.queries
    return frame.operand(0).size(0) * s.heads * tiles


def _room(frame):
    s = _sizes(frame)
    return s.rows * (s.H * 4 + s.score_step + s.sum_step + (ROW + 64)) + TERMS * ROW


def _part(frame: Frame, part, key_type, value_type):
    code, s = frame.code, _sizes(frame)
    q, keys, values, positions, starts, layer, sinks, *bends = (frame.operand(n) for n in range(9))
    B = q.size(0)
    tiles = (s.T + (s.queries - 1)) // s.queries
    # Late queries see most, and come first, so that none of them is left for the end.
    tile, head, row = tiles - 1 - part // (B * s.heads), part % s.heads, part // s.heads % B
    begin = tile * s.queries
    block = ((row * s.layers + code.small_integer(layer.address)) * s.heads + head) * s.cells
    of_head = (row * s.T, s.N, s.group, head * s.group, positions, starts)
    part = _Part(
        code,
        s,
        Queries(code, s.cells, s.window, *of_head),
        q.address,
        sinks,
        Bends(code, *bends),
        [frame.result(n).address for n in range(3)],
        (keys.address + block * s.H * TYPES[key_type], key_type),
        (values.address + block * s.Hv * TYPES[value_type], value_type),
        frame.room,
    )
    with part.queries.documents(begin, code.smaller(begin + s.queries, s.T)) as document:
        part.read(*document)


class _Part(NamedTuple):
    """One part: its operands, and the code of what is done for queries of one document."""

    code: Code
    sizes: _Sizes
    queries: Queries
    q: Value
    sinks: Buffer
    bends: Bends
    results: list
    keys: tuple
    values: tuple
    room: Value

    def read(self, begin, end, start):
        """What queries begin <= t < end read, whose document begins at cell `start`."""
        code, s = self.code, self.sizes
        first, stop = self.queries.span(begin, end, start)
        origin = start + (first - start) // TILE * TILE
        origin = code.select(first < stop, origin, stop)
        panel = self.room
        chains = panel + TERMS * ROW
        held = chains + s.rows * ROW
        sums = held + (s.rows * s.H * 4 + 63) // 64 * 64
        scores = sums + s.rows * s.sum_step
        count = (end - begin) * s.group
        self._gather(begin, count, held)
        self._score(first, stop, origin, count, held, panel, scores)
        with code.loop(0, count) as n:
            self._weigh(begin, n, start, origin, stop, scores + n * s.score_step)
        self._mix(origin, stop, count, scores, panel, chains, sums)
        with code.loop(0, count) as n:
            self._write(begin, n, sums + n * s.sum_step)

    def _gather(self, begin, count, to):
        code, s = self.code, self.sizes
        with code.loop(0, count) as n:
            query = self.q + self.queries.place(begin, n) * s.H * 4
            several, here = s.H - s.H % LANES, to + n * s.H * 4
            with code.loop(0, several, LANES) as h:
                code.put(code.vector(query + h * 4), here + h * 4)
            with code.loop(several, s.H) as h:
                code.put(code.float(query + h * 4), here + h * 4)

    def _score(self, first, stop, origin, count, queries, panel, scores):
        code, s = self.code, self.sizes
        keys, dtype = self.keys
        step = s.H * TYPES[dtype]
        begin = code.larger(origin + (first - origin) // COLUMNS * COLUMNS, 0)
        with code.loop(begin, stop, COLUMNS) as cell:
            here = scores + (cell - origin) * 4
            clear(code, here, count, s.score_step)
            with code.loop(0, s.H, TERMS) as h:
                terms = code.smaller(s.H - h, TERMS)
                at = keys + cell * step + h * TYPES[dtype]
                copy_columns(code, at, step, dtype, terms, stop - cell, panel)
                steps = s.H * 4, 4
                multiply(code, queries + h * 4, steps, count, panel, terms, here, s.score_step)

    def _weigh(self, begin, n, start, origin, stop, scores):
        """Makes the scores of a query head weights, and writes down their peak and their sum."""
        code, s = self.code, self.sizes
        first, last = self.queries.seen(begin + n // s.group, start)
        last = code.larger(last, first)
        is_seen = first < last
        at = lambda p: scores + (p - origin) * 4
        head = self.queries.head + n % s.group
        with code.when(self.bends.is_any()):
            distance = self.queries.position(begin + n // s.group) - origin
            self.bends.bend(scores, first - origin, last - origin, head, distance)
        sink = self.sinks.address + head * 4
        least = code.variable(code.number(_LOWEST))
        with code.when(self.sinks.size(0) > 0):
            least.set(code.float(sink))
        peak, whole = largest(code, at, first, last, least.get()), code.variable(code.number(0.0))
        with code.loop(origin, stop, TILE) as tile:
            low = code.smaller(code.larger(first - tile, 0), TILE)
            high = code.larger(code.smaller(last - tile, TILE), low)
            weights(code, at(tile), low, high, peak, whole)
        with code.when((self.sinks.size(0) > 0) & is_seen):
            whole.set(whole.get() + exp(code, code.float(sink) - peak))
        place = self.queries.place(begin, n) * 4
        code.put(peak, self.results[1] + place)
        code.put(code.select(is_seen, whole.get(), code.number(0.0)), self.results[2] + place)

    def _mix(self, origin, stop, count, scores, panel, chains, sums):
        code, s = self.code, self.sizes
        values, dtype = self.values
        step = s.Hv * TYPES[dtype]
        with code.loop(0, s.Hv, COLUMNS) as h:
            clear(code, sums + h * 4, count, s.sum_step)
        with code.loop(origin, stop, TILE) as tile, code.loop(0, s.Hv, COLUMNS) as h:
            clear(code, chains, count)
            end = code.smaller(tile + TILE, stop)
            with code.loop(code.larger(tile, 0), end, TERMS) as cell:
                terms, at = code.smaller(end - cell, TERMS), values + cell * step
                copy_rows(code, at + h * TYPES[dtype], step, dtype, terms, s.Hv - h, panel)
                steps = s.score_step, 4
                multiply(code, scores + (cell - origin) * 4, steps, count, panel, terms, chains)
            whole = code.constant(COLUMNS)
            add(code, chains, sums + h * 4, s.sum_step, count, whole, tile.equals(origin))

    def _write(self, begin, n, sums):
        code, s = self.code, self.sizes
        place = self.queries.place(begin, n)
        whole = code.float(self.results[2] + place * 4)
        share = code.select(whole > 0.0, code.number(1.0) / whole, code.number(0.0))
        read = self.results[0] + place * s.Hv * 4
        with code.loop(0, s.Hv, LANES) as h:
            code.put(code.vector(sums + h * 4) * code.splat(share), read + h * 4)
