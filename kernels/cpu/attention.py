"""Attention of one query per sequence on blocks as they lie, in the order of `kernels.exact`.

Fast numerics take it too: it reads each cell once, at the speed of memory. A part of it is one key
head of one sequence with the query heads that share it.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.blocks import Blocks
from kernels.cells import is_ring
from kernels.cpu.call import Frame, Kernel, is_available, register
from kernels.cpu.code import LANES, Code
from kernels.cpu.functions import exp
from kernels.cpu.scores import Bends, optional
from kernels.cpu.softmax import TILE, largest, weights
from kernels.cpu.tiles import TYPES
from kernels.exact import attention as exact
from kernels.exact.sums import rounded
from kernels.operands import Shared
from kernels.options import Options
from kernels.tracing.partition import split_by_rows_and_heads

_VECTORS = (8, 4, 2, 1)  # of a value's numbers, whose sums stay in registers
_HEADS = (4, 3, 2, 1)  # query heads that take keys at once
_LOWEST = -3.4e38


def can_read(blocks: Blocks, q, shared: Shared, options: Options) -> bool:
    """Whether `read` does this: floats of few types."""
    arrays = jax.tree.leaves(blocks.arrays)
    (S, H), Hv = arrays[0].shape[-2:], arrays[-1].shape[-1]
    fits = is_available() and len(arrays) == 2 and S > 0 and H % LANES == Hv % LANES == 0
    fits = fits and all(x.dtype.name in TYPES for x in (*arrays, q))
    return fits and (not options.exact or exact.is_in_order(S, H, Hv))


def read(blocks: Blocks, i, q, shared: Shared, options: Options):
    """`kernels.write_read.read`, where `can_read` says so."""
    keys, values = blocks.arrays
    S = keys.shape[-2]
    layer = None if blocks.layer is None else blocks.layer.astype(jnp.int32)
    scaled = rounded(q[:, 0].astype(jnp.float32) * options.scale)
    i = jnp.broadcast_to(i[:, 0], (len(q),)).astype(jnp.int32)
    static = {
        "cells": np.int64(S),
        "is_ring": np.int64(is_ring(options, S)),
        "window": np.int64(options.window or 2**31),
    }
    block = "b" * blocks.batched + "l" * (layer is not None) + "kch"
    call = partial(_call, static, options.soft_cap)
    operands = scaled, keys, values, i, layer, shared.sinks, shared.alibi
    axes = "bnh", block, block, "b", "", "n", "n"
    [z] = split_by_rows_and_heads(call, operands, axes, ["bnh"])
    return rounded(z.astype(q.dtype))[:, None]


def _call(static, soft_cap, q, keys, values, i, layer, sinks, slopes):
    """q [B, N, H], keys [..., K, S, H], values [..., K, S, Hv], i [B] -> [z [B, N, Hv]]."""
    (B, N, H), (K, S, _), Hv = q.shape, keys.shape[-3:], values.shape[-1]
    layers = 1 if layer is None else keys.shape[-4]
    result = jax.ShapeDtypeStruct((B, K, N // K, Hv), jnp.float32)
    # Room for the scores, from the beginning of the first tile on.
    scores = jax.ShapeDtypeStruct((B, K, N // K, -(-S // TILE) * TILE + TILE), jnp.float32)
    layer = jnp.zeros((), jnp.int32) if layer is None else layer
    of_scores = map(optional, (sinks, soft_cap, slopes))
    call = jax.ffi.ffi_call(register(_kernel(keys.dtype.name, values.dtype.name)), (result, scores))
    operands = q.reshape(B, K, N // K, H), keys, values, i, layer, *of_scores
    return [call(*operands, **static, layers=np.int64(layers))[0].reshape(B, N, Hv)]


@cache
def _kernel(key_type, value_type):
    run = partial(_head, key_type=key_type, value_type=value_type)
    heads = lambda frame: frame.operand(0).size(0) * frame.operand(0).size(1)
    return Kernel(f"unison_read_{key_type}_{value_type}", heads, run)


def _head(frame: Frame, part, key_type, value_type):
    """All query heads of one key head of one sequence."""
    code = frame.code
    q, keys, values, positions, layer, sinks, cap, slopes = (frame.operand(n) for n in range(8))
    z, scores = frame.result(0), frame.result(1)
    cells, ring, layers, window = (frame.attribute(n) for n in range(4))
    K, G, H, Hv = q.size(1), q.size(2), q.size(3), z.size(3)
    row, head = part // K, part % K
    i = code.small_integer(positions.address + row * 4)
    block = (row * layers + code.small_integer(layer.address)) * K + head
    first = code.larger(i - window + 1, 0)
    # Beyond the last cell of a block that is no ring there is nothing to see.
    stop = code.select(ring > 0, i + 1, code.smaller(i + 1, cells))
    origin, places = first // TILE * TILE, scores.size(3)  # origin: the position of the first score
    where = _Cells(code, cells, ring)
    keys = keys.address + block * cells * H * TYPES[key_type]
    values = values.address + block * cells * Hv * TYPES[value_type]
    zero, bends = code.number(0.0), Bends(code, cap, slopes)
    queries, scores = q.address + part * G * H * 4, scores.address + part * G * places * 4
    done = code.variable(0)
    for several in _HEADS:
        with code.repeat(lambda several=several: done.get() + several <= G):
            heads = [
                (queries + (done.get() + g) * H * 4, scores + (done.get() + g) * places * 4)
                for g in range(several)
            ]
            for begin, end, held in where.runs(first, stop):
                run = keys + (begin - held) * H * TYPES[key_type]
                _scores(code, heads, run, H, key_type, end - begin, (begin - origin) * 4)
            done.set(done.get() + several)
    with code.loop(0, G) as g:
        score, read = scores + g * places * 4, z.address + (part * G + g) * Hv * 4
        sink = sinks.address + (head * G + g) * 4
        at = lambda p: score + (p - origin) * 4
        least, whole = code.variable(code.number(_LOWEST)), code.variable(zero)
        with code.when(sinks.size(0) > 0):
            least.set(code.float(sink))
        with code.when(bends.is_any()):
            bends.bend(score, first - origin, stop - origin, head * G + g, i - origin)
        peak = largest(code, at, first, stop, least.get())
        with code.loop(0, Hv, LANES) as h:
            code.put(code.splat(zero), read + h * 4)
        with code.loop(origin, stop, TILE) as tile:
            begin, end = code.larger(tile, first), code.smaller(tile + TILE, stop)
            weights(code, at(tile), begin - tile, end - tile, peak, whole)
            _mix(code, where, values, Hv, value_type, begin, end, at, read)
        with code.when(first < stop):
            with code.when(sinks.size(0) > 0):
                whole.set(whole.get() + exp(code, code.float(sink) - peak))
            share = code.splat(code.number(1.0) / whole.get())
            with code.loop(0, Hv, LANES) as h:
                code.put(code.vector(read + h * 4) * share, read + h * 4)


class _Cells:
    """In which cells positions lie: those of a ring in two runs."""

    def __init__(self, code, cells, ring):
        self.code, self.cells, self.ring = code, cells, ring

    def runs(self, begin, end):
        """Runs (begin, end, held) of positions begin <= p < end that lie in cells p - held."""
        code = self.code
        turn = code.select(self.ring > 0, (end - 1) // self.cells * self.cells, code.constant(0))
        turn = code.larger(turn, 0)
        middle = code.larger(code.smaller(turn, end), begin)
        yield begin, middle, code.larger(turn - self.cells, 0)
        yield middle, end, turn


def _scores(code: Code, heads, keys, H, dtype, cells, to):
    """Writes q.k of so many cells from `keys` on; each is one chain over the numbers of a head.

    heads: (query, scores) of query heads; `to` are bytes of a head's scores before these.
    """
    size = TYPES[dtype]
    several, zero = cells - cells % LANES, code.number(0.0)
    with code.loop(0, several, LANES) as p:
        rows = [keys + (p + n) * H * size for n in range(LANES)]
        sums = [code.variable(code.splat(zero)) for _ in heads]
        with code.loop(0, H, LANES) as h:
            for n in range(LANES * LANES * size // 64):
                code.prefetch(rows[0] + (H + h) * (LANES * size) + 64 * n)
            block = [code.vector(row + h * size, dtype) for row in rows]
            for n, column in enumerate(code.transposed(block)):
                for total, (query, _) in zip(sums, heads, strict=True):
                    one = code.splat(code.float(query + (h + n) * 4))
                    total.set(code.fma(one, column, total.get()))
        for total, (_, scores) in zip(sums, heads, strict=True):
            code.put(total.get(), scores + to + p * 4)
    for query, scores in heads:
        with code.loop(several, cells) as p:
            total = code.variable(zero)
            with code.loop(0, H) as h:
                key = code.float(keys + (p * H + h) * size, dtype)
                total.set(code.fma(code.float(query + h * 4), key, total.get()))
            code.put(total.get(), scores + to + p * 4)


def _mix(code, where, values, Hv, dtype, begin, end, at, read):
    """Adds a tile's values, weighted; each number of it is one chain over the cells."""
    size = TYPES[dtype]
    done = code.variable(0)
    for vectors in _VECTORS:
        with code.repeat(lambda vectors=vectors: done.get() + vectors * LANES <= Hv):
            h, zeros = done.get(), code.splat(code.number(0.0))
            sums = [code.variable(zeros) for _ in range(vectors)]
            for first, last, held in where.runs(begin, end):
                with code.loop(first, last) as p:
                    value = values + ((p - held) * Hv + h) * size
                    weight = code.splat(code.float(at(p)))
                    for n, total in enumerate(sums):
                        term = code.vector(value + n * LANES * size, dtype)
                        total.set(code.fma(weight, term, total.get()))
            for n, total in enumerate(sums):
                place = read + (h + n * LANES) * 4
                code.put(code.vector(place) + total.get(), place)
            done.set(h + vectors * LANES)
