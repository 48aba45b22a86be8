"""Attention by position in one order of sums: a query reads the same bits whatever runs beside it.

The softmax takes two passes over the cells. The first finds the largest score, which has no order;
the second adds up tile after tile of `TILE` cells, where tiles begin at multiples of their size
from the query's first position on. Within a tile the sum is a chain, in which cells that a query
does not see are zeros that change nothing: the size of the block and how it is cut do not matter.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from kernels.exact.order import COLUMNS
from kernels.exact.products import batched
from kernels.exact.sums import rounded
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.partition import vary_like

TILE = 256
ROWS = 256  # queries times heads that share a key
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_FAR = jnp.iinfo(jnp.int32).max


def forward(q, blocks: Blocks, where: Where, shared: Shared, options: Options):
    """`attend` of a backend on blocks as they lie, without a gradient: (z, lse)."""
    B, T, N, H = q.shape
    K = blocks.arrays[0].shape[-3]
    dtype = q.dtype
    q = rounded(q.astype(jnp.promote_types(dtype, jnp.float32)) * options.scale)
    size = min(T, max(1, ROWS * K // N))
    tiled = functools.partial(_tiles, size=size)
    # [tiles, B, K, t, G, H]
    grouped = jnp.moveaxis(tiled(q).reshape(-1, B, size, K, N // K, H), 3, 2)
    positions, starts = tiled(where.q_positions, fill=-1), tiled(where.q_starts)
    read = functools.partial(_read, blocks, where.kv_positions, shared, options)
    z, lse = jax.lax.map(lambda tile: read(*tile), (grouped, positions, starts))
    whole = lambda x: jnp.moveaxis(x, 3, 2).reshape(-1, B, size, N, *x.shape[5:])
    z, lse = (jnp.moveaxis(whole(x), 0, 1) for x in (z, lse))
    z = z.reshape(B, -1, N, z.shape[-1])[:, :T]
    return rounded(z.astype(dtype)), lse.reshape(B, -1, N)[:, :T]


def _tiles(x, size, fill=0):
    """[B, T, ...] -> [tiles, B, size, ...], filled up at the end."""
    if x is None:
        return None
    x = jnp.pad(
        x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
    )
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _read(blocks, kv_positions, shared, options, q, positions, starts):
    """One tile of queries: q [B, K, t, G, H], positions and starts [B or 1, t] -> (z, lse)."""
    B, K, t, G, _ = q.shape
    S, Hv = blocks.arrays[1].shape[-2:]
    size = min(S, TILE)
    heads = lambda x: x.astype(q.dtype).reshape(1, K, 1, G)
    first = jnp.zeros_like(positions) if starts is None else starts
    seen = first
    if options.window is not None:
        seen = jnp.maximum(first, positions - options.window + 1)

    def scores(begin):
        """The tile of cells from `begin` on: scores [B, K, t, G, size'], visible, values."""
        at = jnp.clip(begin, 0, S - size)
        key, value = (x.astype(q.dtype) for x in blocks.tile(at, size))
        short = -size % COLUMNS
        key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) for x in (key, value))
        cells = at + jnp.arange(size + short)
        held = cells[None]
        if kv_positions is not None:
            held = jax.lax.dynamic_slice_in_dim(kv_positions, at, size, 1)
            held = jnp.pad(held, ((0, 0), (0, short)), constant_values=-1)
        real = (positions >= 0)[:, :, None] & (held >= 0)[:, None]
        distance = positions[:, :, None] - held[:, None]
        visible = real & (distance >= 0) & (held[:, None] >= seen[:, :, None])
        visible &= (cells >= begin) & (cells < begin + TILE) & (cells < at + size)
        result = _product(q, key, turned=True)
        if options.soft_cap is not None:
            result = rounded(options.soft_cap * jnp.tanh(result / options.soft_cap))
        if shared.alibi is not None:
            slopes = heads(shared.alibi)[..., None]
            result = result - rounded(slopes * distance[:, None, :, None].astype(result.dtype))
        return result, visible[:, None, :, None], value

    def highest(begin, peak):
        result, visible, _ = scores(begin)
        return jnp.maximum(peak, jnp.where(visible, result, _MASKED).max(-1))

    peak = jnp.full((B, K, t, G), _MASKED, q.dtype)
    if shared.sinks is not None:
        peak = jnp.maximum(peak, heads(shared.sinks))
    loop = functools.partial(_loop, positions, seen, S, kv_positions is not None)
    peak = loop(highest, vary_like(peak, q))

    def add(begin, sums, mine=True):
        total, mixed = sums
        result, visible, value = scores(begin)
        weights = jnp.where(visible & mine, jnp.exp(result - peak[..., None]), 0)
        ones = jnp.ones((1, weights.shape[-1], COLUMNS), weights.dtype)
        part = batched(weights.reshape(1, -1, weights.shape[-1]), ones)[0, :, 0]
        return total + part.reshape(total.shape), mixed + _product(weights, value)

    sums = jnp.zeros((B, K, t, G), q.dtype), jnp.zeros((B, K, t, G, Hv), q.dtype)
    sums = vary_like(sums, q)
    if starts is None:
        total, mixed = loop(add, sums)
    else:
        total, mixed = _documents(add, sums, positions, starts, seen)
    empty = total == 0
    if shared.sinks is not None:
        total = total + jnp.exp(heads(shared.sinks) - peak)
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return mixed / total[..., None], lse


def _product(x, w, turned=False):
    """x [B, K, t, G, m] on a tile w [B, K, ...] -> [B, K, t, G, n]."""
    B, K, t, G, m = x.shape
    y = batched(x.reshape(B * K, t * G, m), w.reshape(B * K, *w.shape[2:]), turned)
    return y.reshape(B, K, t, G, -1)


def _loop(positions, seen, S, anywhere, step, state):
    """`step(begin, state)` over the tiles of cells that some query sees, or all of them."""
    if anywhere:
        first, stop = 0, -(-S // TILE)
    else:
        first = jnp.where(positions >= 0, seen, _FAR).min()
        stop = jnp.minimum(jnp.maximum(positions, -1).max() // TILE + 1, -(-S // TILE))
        first = jnp.minimum(jnp.maximum(first, 0) // TILE, stop)
    return jax.lax.fori_loop(first, stop, lambda n, state: step(n * TILE, state), state)


def _documents(step, state, positions, starts, seen):
    """`step(begin, state, mine)` over the tiles of each document, which begin where it does."""
    real = positions >= 0

    def begin_of(start):
        mine = real & (starts == start)
        offset = jnp.where(mine, seen - starts, _FAR).min()
        return start + offset // TILE * TILE

    def after(start):
        return jnp.where(real & (starts > start), starts, _FAR).min()

    def body(carry):
        start, begin, state = carry
        mine = real & (starts == start)
        state = step(begin, state, mine[:, None, :, None, None])
        more = begin + TILE <= jnp.where(mine, positions, -1).max()
        start = jnp.where(more, start, after(start))
        return start, jnp.where(more, begin + TILE, begin_of(start)), state

    start = jnp.where(real, starts, _FAR).min()
    carry = start, begin_of(start), state
    return jax.lax.while_loop(lambda carry: carry[0] != _FAR, body, carry)[2]
