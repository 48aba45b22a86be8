"""Attention by position in one order of sums: a query reads the same bits whatever runs beside it.

The softmax takes two passes over the cells. The first writes the scores down and finds the largest,
which has no order; the second adds up tile after tile of `TILE` cells, where tiles begin at
multiples of their size from the query's first position on. In a tile values are summed in a chain,
in which cells that a query does not see are zeros that change nothing, and weights in a tree over
the places of the tile: the size of the block and how it is cut do not matter.
"""

import functools

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from kernels.exact import functions
from kernels.exact.order import COLUMNS, few_rows
from kernels.exact.products import MOST, batched
from kernels.exact.sums import TILE, rounded, tree
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.partition import vary_like

ROWS = 256  # queries times heads that share a key, at most; of long blocks fewer, but not
FEWEST_ROWS = 64  # fewer than so many
STORED = 2**22  # scores of a sequence that are kept at a time, if there may be so few
_FEW, _TILES_OF_FEW = 16, 4  # so few rows take several tiles at once, as one product
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_FAR = jnp.iinfo(jnp.int32).max


def forward(q, blocks: Blocks, where: Where, shared: Shared, options: Options):
    """`attend` of a backend on blocks as they lie, without a gradient: (z, lse)."""
    B, T, N, H = q.shape
    K = blocks.arrays[0].shape[-3]
    dtype = q.dtype
    q = rounded(q.astype(jnp.promote_types(dtype, jnp.float32)) * options.scale)
    rows = min(ROWS, max(FEWEST_ROWS, STORED // (K * blocks.arrays[0].shape[-2])))
    size = min(T, max(1, rows * K // N))
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


def is_in_order(S: int, H: int, Hv: int) -> bool:
    """Whether products on a block of S cells are chains over numbers, and over a tile's cells."""
    columns = lambda n: n + -n % COLUMNS
    sizes = {columns(_step(S, rows)) for rows in (1, ROWS)}
    known = [few_rows(H, size, jnp.float32, True) for size in sizes]
    known += [few_rows(min(size, TILE), columns(Hv), jnp.float32, False) for size in sizes]
    return H <= MOST and all(known)


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
    size = _step(S, t * G if starts is None else ROWS)
    aligned = starts is None and S % size == 0
    heads = lambda x: x.astype(q.dtype).reshape(1, K, 1, G)
    seen = jnp.zeros_like(positions) if starts is None else starts
    if options.window is not None:
        seen = jnp.maximum(seen, positions - options.window + 1)

    def tile(at):
        """So many cells from `at` on: keys and values, filled up to a number of columns."""
        fill = ((0, 0), (0, 0), (0, -size % COLUMNS), (0, 0))
        return [jnp.pad(x.astype(q.dtype), fill) for x in blocks.tile(at, size)]

    def scores(at):
        """Of the cells from `at` on: [B, K, t, G, size], `_MASKED` where a query does not see."""
        held = at + jnp.arange(size)[None]
        if kv_positions is not None:
            held = jax.lax.dynamic_slice_in_dim(kv_positions, at, size, 1)
        distance = positions[:, :, None] - held[:, None]
        visible = (positions >= 0)[:, :, None] & (held >= 0)[:, None]
        visible &= (distance >= 0) & (held[:, None] >= seen[:, :, None])
        result = _product(q, tile(at)[0], turned=True)[..., :size]
        if options.soft_cap is not None:
            cap = jnp.asarray(options.soft_cap, result.dtype)
            result = rounded(cap * functions.tanh(result * (1 / cap)))
        if shared.alibi is not None:
            slopes = heads(shared.alibi)[..., None]
            result = result - rounded(slopes * distance[:, None, :, None].astype(result.dtype))
        return jnp.where(visible[:, None, :, None], result, _MASKED)

    def store(begin, stored):
        at = jnp.minimum(begin, S - size)
        return jax.lax.dynamic_update_slice_in_dim(stored, scores(at), at, -1)

    loop = functools.partial(_loop, positions, seen, S, size, kv_positions is not None)
    if size == S:
        stored = scores(0)
    else:
        stored = jnp.full((B, K, t, G, S), _MASKED, q.dtype)
        stored = loop(store, vary_like(stored, q))
    peak = stored.max(-1)
    if shared.sinks is not None:
        peak = jnp.maximum(peak, heads(shared.sinks))

    def add(begin, sums, mine=True):
        at = jnp.clip(begin, 0, S - size)
        score = jax.lax.dynamic_slice_in_dim(stored, at, size, -1)
        weights = jnp.where(score == _MASKED, 0, functions.exp(score - peak[..., None]))
        if not aligned:
            cells = at + jnp.arange(size)
            weights = jnp.where((cells >= begin) & (cells < begin + TILE) & mine, weights, 0)
        mixed, weights = _mix(weights, tile(at)[1]), _tiled(weights)
        if not aligned:
            weights = jnp.roll(weights, at - begin, -1)  # to where they are in the tile
        of_tiles = tree(weights)
        for n in range(of_tiles.shape[-1]):
            sums = sums[0] + of_tiles[..., n], sums[1] + mixed[..., n, :]
        return sums

    sums = jnp.zeros((B, K, t, G), q.dtype), jnp.zeros((B, K, t, G, Hv), q.dtype)
    sums = vary_like(sums, q)
    if starts is not None:
        sums = _documents(add, sums, positions, starts, seen)
    else:
        sums = add(0, sums) if size == S else loop(add, sums)
    whole, mixed = sums
    empty = whole == 0
    if shared.sinks is not None:
        whole = whole + functions.exp(heads(shared.sinks) - peak)
    whole = jnp.where(empty, 1, whole)
    lse = jnp.where(empty, -jnp.inf, peak + functions.log(whole))
    return mixed * rounded(1 / whole)[..., None], lse


def _step(S, rows):
    """How many of S cells are read at once: one tile, or several whole ones for few rows."""
    most = _TILES_OF_FEW if rows <= _FEW else 1
    return next((n * TILE for n in range(most, 1, -1) if S % (n * TILE) == 0), min(S, TILE))


def _tiled(weights):
    """[..., size] -> [..., tiles, TILE]"""
    short = -weights.shape[-1] % TILE
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, short)])
    return weights.reshape(*weights.shape[:-1], -1, TILE)


def _mix(weights, values):
    """weights [B, K, t, G, size], values [B, K, size or more, Hv] -> [B, K, t, G, tiles, Hv]."""
    B, K, t, G, size = weights.shape
    tile = min(values.shape[2], TILE)
    short = values.shape[2] - size
    weights = jnp.pad(weights, [(0, 0)] * 4 + [(0, short)]).reshape(B, K, t * G, -1, tile)
    values = values.reshape(-1, tile, values.shape[-1])
    mixed = batched(jnp.moveaxis(weights, 3, 2).reshape(len(values), t * G, tile), values)
    return jnp.moveaxis(mixed.reshape(B, K, -1, t, G, values.shape[-1]), 2, 4)


def _product(x, w, turned=False):
    """x [B, K, t, G, m] on a tile w [B, K, ...] -> [B, K, t, G, n]."""
    B, K, t, G, m = x.shape
    y = batched(x.reshape(B * K, t * G, m), w.reshape(B * K, *w.shape[2:]), turned)
    return y.reshape(B, K, t, G, -1)


def _loop(positions, seen, S, size, anywhere, step, state):
    """`step(begin, state)` over the tiles of cells that some query sees, or all of them."""
    if anywhere:
        first, stop = 0, -(-S // size)
    else:
        first = jnp.where(positions >= 0, seen, _FAR).min()
        stop = jnp.minimum(jnp.maximum(positions, -1).max() // size + 1, -(-S // size))
        first = jnp.minimum(jnp.maximum(first, 0) // size, stop)
    return jax.lax.fori_loop(first, stop, lambda n, state: step(n * size, state), state)


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
