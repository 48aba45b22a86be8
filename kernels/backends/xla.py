"""Blockwise attention in plain JAX: any platform, memory linear in T and S.

Softmax runs online over tiles of keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135). The loop over keys starts at the first tile that some query of the tile can see
and ends at the last one, so a read costs in proportion to the cells written, not to the capacity.

Inside this file queries are grouped by the key head they read, [B, K, T, G, H] with G = N / K, and
scores are [B, K, T, G, S].
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.cells import corner, is_batched, is_ring, ring_positions, write_one
from kernels.options import Options
from kernels.tracing.partition import vary_like

QUERY_ROWS = 256
KEY_TILE = 256
LARGE_KEY_TILE = 1024  # of one query, which only reads: nearer to the speed of memory
PARTS = 8  # of the cells that one query reads at once
# Stands for -inf: finite, so that the difference of two masked maxima is 0 and not nan.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(
    q,
    keys,
    values,
    q_positions,
    kv_positions=None,
    q_starts=None,
    sinks=None,
    alibi=None,
    *,
    options: Options,
):
    """Attention by position: a query at i reads the keys at start..i.

    Args:
      q: [B, T, N, H].
      keys, values: [B, K, S, H]; N is a multiple of K.
      q_positions: [B or 1, T] int32; a negative position is padding, which reads nothing.
      kv_positions: [B or 1, S] int32, negative where a cell is empty; None: cell s holds
        position s.
      q_starts: [B or 1, T] int32, the first position each query may read; None: 0.
      sinks: [N] logits that join the softmax's denominator (gpt-oss); None: none.
      alibi: [N] constant slopes, score -= slope * (i - p) (arXiv:2108.12409); None: none.
      options: scale, window, soft cap.

    Returns:
      z [B, T, N, H] in q's dtype, zero where a query reads nothing; and the log-sum-exp [B, T, N]
      of the scores in float32, -inf where a query reads nothing. Both have gradients, for q, keys,
      values and sinks.
    """
    operands = (q, keys, values, q_positions, kv_positions, q_starts, sinks, alibi)
    return _attend(options, *vary_like(operands, operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, keys, values, q_positions, kv_positions, q_starts, sinks, alibi):
    return forward(
        q,
        keys,
        values,
        None,
        q_positions,
        kv_positions,
        q_starts,
        sinks,
        alibi,
        options=options,
    )


def _attend_fwd(options, *operands):
    z, lse = _attend(options, *operands)
    return (z, lse), (operands, z, lse)


def _attend_bwd(options, residuals, cotangents):
    operands, z, lse = residuals
    dq, dkeys, dvalues, dsinks = _backward(options, operands, z, lse, *cotangents)
    return dq, dkeys, dvalues, None, None, None, dsinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def forward(
    q, keys, values, layer, q_positions, kv_positions, q_starts, sinks, alibi, *, options: Options
):
    """`attend` on blocks as they lie (see `cells.write_one`), without a gradient.

    They are read tile by tile, so no copy is made.
    """
    num_kv_heads, num_cells = keys.shape[-3:-1]
    one_query = q.shape[1] == 1
    masking = _Masking(
        options,
        num_cells,
        kv_positions,
        alibi,
        num_kv_heads,
        large=LARGE_KEY_TILE if one_query else None,
        # A product with the block as it lies needs no copy of tiles, and is twice as fast where
        # most cells are read. Narrow types would be widened first, a layer of a stack cut out.
        whole=one_query and layer is None and keys.dtype == jnp.float32,
    )

    def read(query):
        def step(begin, size, state):
            peak, total, mixed = state
            key = masking.slice(keys, layer, begin, size)
            scores, visible, _ = masking.scores(query, key, begin)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.where(visible, jnp.exp(scores - new_peak[..., None]), 0)
            shrink = jnp.exp(peak - new_peak)
            value = masking.slice(values, layer, begin, size)
            mixed = mixed * shrink[..., None] + _mix(weights, value)
            return new_peak, total * shrink + weights.sum(-1), mixed

        rows = query["q"].shape
        dtype = _accumulator(q)
        state = jnp.full(rows[:-1], MASKED, dtype), jnp.zeros(rows[:-1], dtype)
        state = vary_like((*state, jnp.zeros(rows, dtype)), q)
        peak, total, mixed = masking.loop(query, step, state)
        if sinks is not None:
            sink = _grouped_heads(sinks.astype(dtype), num_kv_heads)
            new_peak = jnp.maximum(peak, sink)
            shrink = jnp.exp(peak - new_peak)
            mixed, total = mixed * shrink[..., None], total * shrink + jnp.exp(sink - new_peak)
            peak = new_peak
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
        return (mixed / total[..., None]).astype(q.dtype), lse

    queries = _tile_queries({"q": q}, q_positions, q_starts, num_kv_heads)
    several = _several(queries)
    return _untile(jax.lax.map(read, queries) if several else read(queries), q, several)


def decode(keys, values, layer, cells, starts, k, v, q, sinks, alibi, *, options: Options):
    """`kernels.write_read.write_read` for one token of each sequence, without a gradient.

    One cell changes in place, and the read is from the blocks as they lie. They are not even
    reshaped: where a loop carries them in another shape, XLA makes a copy at every step.
    """
    size = keys.shape[-2]
    ring = is_ring(options, size)
    slots = cells[:, 0] % size if ring else cells[:, 0]
    slots = jnp.where(cells[:, 0] < 0, -1, slots)
    keys = write_one(keys, layer, slots, k[:, 0])
    values = write_one(values, layer, slots, v[:, 0])
    # Without the barrier XLA fuses the write into each of its uses: a copy of the block for each.
    keys, values = jax.lax.optimization_barrier((keys, values))
    held = ring_positions(cells, size) if ring else None
    z, _ = forward(q, keys, values, layer, cells, held, starts, sinks, alibi, options=options)
    return keys, values, z


def _backward(options, operands, z, lse, dz, dlse):
    """Gradients by recomputing the weights from the log-sum-exp, tile by tile."""
    q, keys, values, q_positions, kv_positions, q_starts, sinks, alibi = operands
    num_kv_heads = keys.shape[1]
    masking = _Masking(options, keys.shape[2], kv_positions, alibi, num_kv_heads)
    dtype = _accumulator(q)
    # d loss / d score = weight * (d loss / d weight - delta); the log-sum-exp's own cotangent
    # enters the same way, since d lse / d score = weight.
    delta = jnp.einsum("btnh,btnh->btn", z, dz, preferred_element_type=dtype) - dlse

    def read(gradients, query):
        def step(begin, size, state):
            dq, dkeys, dvalues = state
            key, value = (masking.slice(x, None, begin, size) for x in (keys, values))
            scores, visible, slope = masking.scores(query, key, begin)
            weights = jnp.where(visible, jnp.exp(scores - query["lse"][..., None]), 0)
            dweights = _dot("bktgh,bksh->bktgs", query["dz"], value)
            dscores = weights * (dweights - query["delta"][..., None]) * options.scale
            if slope is not None:
                dscores = dscores * slope
            dvalues = masking.add(dvalues, begin, _dot("bktgs,bktgh->bksh", weights, query["dz"]))
            dkeys = masking.add(dkeys, begin, _dot("bktgs,bktgh->bksh", dscores, query["q"]))
            return dq + _dot("bktgs,bksh->bktgh", dscores, key), dkeys, dvalues

        zero = vary_like(jnp.zeros(query["q"].shape, dtype), q)
        dq, *gradients = masking.loop(query, step, (zero, *gradients))
        return tuple(gradients), dq

    gradients = vary_like((jnp.zeros(keys.shape, dtype), jnp.zeros(values.shape, dtype)), q)
    per_query = {"q": q, "dz": dz, "lse": lse, "delta": delta}
    queries = _tile_queries(per_query, q_positions, q_starts, num_kv_heads)
    several = _several(queries)
    (dkeys, dvalues), dq = (
        jax.lax.scan(read, gradients, queries) if several else read(gradients, queries)
    )
    dsinks = None
    if sinks is not None:
        # A query that reads nothing has no weight for a sink of -inf either.
        weights = jnp.exp(sinks - jnp.where(jnp.isneginf(lse), 0, lse))
        dsinks = -jnp.einsum("btn,btn->n", weights, delta).astype(sinks.dtype)
    return (
        _untile(dq, q, several).astype(q.dtype),
        dkeys.astype(keys.dtype),
        dvalues.astype(values.dtype),
        dsinks,
    )


class _Masking:
    """Which tiles of keys a tile of queries sees, and the masked scores of one such tile."""

    def __init__(
        self, options, num_cells, kv_positions, alibi, num_kv_heads, *, large=None, whole=False
    ):
        """How the cells are read.

        large: cells of the tiles that most of a long range takes; None: all tiles are small.
        whole: all cells at once where more than half of the tiles are seen.
        """
        self.options = options
        self.num_cells = num_cells
        self.size = min(num_cells, KEY_TILE)
        self.large = large if large and large < num_cells else None
        self.whole = whole
        self.num_tiles = -(-num_cells // self.size)
        self.kv_positions = kv_positions
        self.slopes = None if alibi is None else _grouped_heads(alibi, num_kv_heads)[..., None]

    def start(self, begin, size):
        """First cell of the tile for the cells from `begin`; the last one ends with the block."""
        return jnp.minimum(begin, self.num_cells - size)

    def slice(self, blocks, layer, begin, size):
        """One tile [B, K, size, H] of blocks, of the given layer where they are stacked."""
        batched = is_batched(blocks, layer)
        if layer is None and size == self.num_cells:
            return blocks if batched else blocks[None]
        at = corner(0 if batched else None, layer, self.start(begin, size))
        K, _, H = blocks.shape[-3:]
        front = (*blocks.shape[:batched], *(() if layer is None else (1,)))
        return jax.lax.dynamic_slice(blocks, at, (*front, K, size, H)).reshape(-1, K, size, H)

    def add(self, block, begin, tile):
        """Adds a tile of gradient [B, K, size, H] to a block's [B, K, S, H]."""
        size = tile.shape[2]
        if size == self.num_cells:
            return block + tile
        start = self.start(begin, size)
        old = jax.lax.dynamic_slice_in_dim(block, start, size, 2)
        return jax.lax.dynamic_update_slice_in_dim(block, old + tile, start, 2)

    def scores(self, query, key, begin):
        """Scores [B, K, T, G, size], which of them are visible, and the soft cap's slope."""
        options = self.options
        scores = _scores(query["q"], key) * options.scale
        slope = None
        if options.soft_cap is not None:
            bent = jnp.tanh(scores / options.soft_cap)
            scores, slope = bent * options.soft_cap, 1 - bent**2
        size = key.shape[2]
        start = self.start(begin, size)
        cells = start + jnp.arange(size)
        positions = cells[None]
        if self.kv_positions is not None:
            positions = jax.lax.dynamic_slice_in_dim(self.kv_positions, start, size, 1)
        distance = query["positions"][:, :, None] - positions[:, None, :]
        first = 0 if query["starts"] is None else jnp.maximum(query["starts"], 0)[:, :, None]
        visible = (distance >= 0) & (positions[:, None, :] >= first)
        if options.window is not None:
            visible &= distance < options.window
        if self.num_cells % self.size:  # cells that the tile before has read already
            visible &= cells >= begin
        if self.slopes is not None:
            scores -= self.slopes * distance[:, None, :, None, :]
        visible = visible[:, None, :, None, :]
        return jnp.where(visible, scores, MASKED), visible, slope

    def loop(self, query, step, state):
        """Runs `step(begin, size, state)` over the tiles that some query of the tile sees."""
        if self.num_tiles == 1 and query["q"].shape[2] > 1:  # a block just written would be copied
            return step(0, self.size, state)
        first, stop = self._range(query)
        if self.whole:
            return jax.lax.cond(
                2 * (stop - first) > self.num_tiles,
                lambda: step(0, self.num_cells, state),
                lambda: self._loop(first, stop, step, state),
            )
        return self._loop(first, stop, step, state)

    def _loop(self, first, stop, step, state):
        if self.large:
            ratio = self.large // self.size
            count = (stop - first) // ratio
            begin, first = first * self.size, first + count * ratio
            large = lambda n, state: step(begin + n * self.large, self.large, state)
            state = jax.lax.fori_loop(0, count, large, state)
        small = lambda n, state: step(n * self.size, self.size, state)
        return jax.lax.fori_loop(first, stop, small, state)

    def _range(self, query):
        """The first tile that is seen, and the one after the last."""
        positions = query["positions"]
        real = positions >= 0
        last = positions.max()
        first = jnp.zeros_like(positions) if query["starts"] is None else query["starts"]
        if self.options.window is not None:
            first = jnp.maximum(first, positions - self.options.window + 1)
        first = jnp.maximum(jnp.where(real, first, jnp.iinfo(jnp.int32).max).min(), 0)
        if self.kv_positions is None:
            stop = jnp.minimum(last // self.size + 1, self.num_tiles)
            return jnp.minimum(first // self.size, stop), stop
        short = self.num_tiles * self.size - self.num_cells
        held = jnp.pad(self.kv_positions, ((0, 0), (0, short)), constant_values=-1)
        held = held.reshape(-1, self.num_tiles, self.size)
        lowest = jnp.where(held < 0, jnp.iinfo(jnp.int32).max, held).min((0, 2))
        seen = (lowest <= last) & (held.max((0, 2)) >= first)
        stop = jnp.where(seen.any(), self.num_tiles - jnp.argmax(seen[::-1]), 0)
        return jnp.argmax(seen), stop


def _tile_queries(arrays, positions, starts, num_kv_heads):
    """Groups arrays [B, T, N, ...] by key head and cuts T into tiles, on a new leading axis.

    One tile gets no such axis. Rows are padded with position -1, which reads nothing.
    """
    _, T, N = next(iter(arrays.values())).shape[:3]
    size = min(T, max(1, QUERY_ROWS * num_kv_heads // N))
    short = -T % size

    def tiled(x, fill=0):
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def grouped(x):  # [tiles, B, t, N, ...] -> [tiles, B, K, t, G, ...]
        x = x.reshape(*x.shape[:3], num_kv_heads, N // num_kv_heads, *x.shape[4:])
        return jnp.moveaxis(x, 3, 2)

    queries = {name: grouped(tiled(x)) for name, x in arrays.items()}
    queries |= {"positions": tiled(positions, -1), "starts": tiled(starts)}
    return jax.tree.map(lambda x: x[0], queries) if size == T else queries


def _several(queries):
    return queries["positions"].ndim == 3


def _untile(results, like, tiled):
    """Undoes `_tile_queries`: [(tiles,) B, K, t, G, ...] -> [B, T, N, ...]."""
    B, T, N, _ = like.shape

    def whole(x):
        x = jnp.moveaxis(x if tiled else x[None], 0, 2)  # [B, K, tiles, t, G, ...]
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :T]
        return jnp.moveaxis(x, 1, 2).reshape(B, T, N, *x.shape[4:])

    return jax.tree.map(whole, results)


def _scores(q, key):
    """q [B, K, t, G, H] on a tile of keys [B, K, s, H] -> [B, K, t, G, s]."""
    if q.shape[2] * q.shape[3] > 1:
        return _dot("bktgh,bksh->bktgs", q, key)
    # Keys first, as they lie: for one query XLA would transpose the whole tile otherwise.
    return jnp.moveaxis(_dot("bksh,bktgh->bkstg", key, q), 2, 4)


def _mix(weights, value):
    """weights [B, K, t, G, s] on a tile of values [B, K, s, H] -> [B, K, t, G, H]."""
    B, K, t, G, s = weights.shape
    if t * G > 1 or s % PARTS or s < PARTS * KEY_TILE:
        return _dot("bktgs,bksh->bktgh", weights, value)
    # In parts: for one query XLA on CPU would sum down a long column at half the speed.
    weights = weights.reshape(B, K, PARTS, s // PARTS)
    value = value.reshape(B, K, PARTS, s // PARTS, -1)
    return _dot("bkps,bkpsh->bkph", weights, value).sum(2)[:, :, None, None]


def _grouped_heads(x, num_kv_heads):
    """[N] -> [1, K, 1, G], to go with [B, K, T, G]."""
    return x.reshape(1, num_kv_heads, 1, -1)


def _accumulator(q):
    return jnp.promote_types(q.dtype, jnp.float32)


def _dot(subscripts, a, b):
    """A product in the narrower of both types, summed in float32 or wider."""
    accumulate = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    dtype = a.dtype if a.dtype.itemsize < b.dtype.itemsize else b.dtype
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=accumulate
    )
