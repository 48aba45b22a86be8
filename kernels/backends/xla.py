"""Blockwise attention in plain JAX: any platform, memory linear in T and S.

Softmax runs online over tiles of keys (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
arXiv:2205.14135). The loop over keys starts at the first tile that some query of the tile can see
and ends at the last one, so a read costs in proportion to the cells written, not to the capacity.

Inside this file queries are grouped by the key head they read, [B, K, T, G, H] with G = N / K, and
scores are [B, K, T, G, S].
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from kernels.cells import consecutive, in_order, is_ring, ring_positions, write_one
from kernels.cpu import attention as on_cpu
from kernels.cpu import many_queries
from kernels.cpu.gradient import gradients as on_cpu_gradients
from kernels.exact import attention as exact
from kernels.int8 import floats, is_int8
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.linear import linear_call
from kernels.tracing.partition import vary_like

QUERY_ROWS = 256
KEY_TILE = 256
LARGE_KEY_TILE = 1024  # of one query, which only reads: nearer to the speed of memory
FEW = 8  # queries: those of one token that share a key head
PARTS = 8  # of the cells that one query reads at once
# Stands for -inf: finite, so that the difference of two masked maxima is 0 and not nan.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attend(q, keys, values, where: Where, shared: Shared, *, options: Options):
    """Attention by position: a query at i reads the keys at start..i.

    Args:
      q: [B, T, N, H].
      keys, values: [B, K, S, H] and [B, K, S, Hv]; N is a multiple of K. Each may be an `Int8`,
        of which a tile at a time is made floats.
      where: which keys each query reads.
      shared: sinks and ALiBi's slopes.
      options: scale, window, soft cap.

    Returns:
      z [B, T, N, Hv] in q's dtype, zero where a query reads nothing; and the log-sum-exp [B, T, N]
      of the scores in float32, -inf where a query reads nothing. Both have gradients, for q, keys,
      values and sinks.
    """
    moving, fixed = (q, keys, values, shared.sinks), (where, shared.alibi)
    return _attend(options, *vary_like((moving, fixed), (moving, fixed)))


# moving: q, keys, values and sinks, which have gradients; fixed: the rest.
def _plain(options, moving, fixed, forward):
    (q, keys, values, sinks), (where, alibi) = moving, fixed
    blocks = _readable(Blocks((keys, values), batched=True), q, options)
    return forward(q, blocks, where, Shared(sinks, alibi), options)


@jax.custom_jvp
def _attend(options, moving, fixed):
    return _plain(options, moving, fixed, _forward)


@_attend.defjvp
def _attend_jvp(primals, tangents):
    results = _attend(*primals)
    return results, linear_call(_tangent, _backward, (primals, results), tangents[1], results)


def _tangent(residuals, tangents):
    """Tangents of z and the log-sum-exp, as JAX derives them."""
    (options, moving, fixed), _ = residuals
    plain = lambda moving: _plain(options, moving, fixed, _by_tiles)
    return jax.jvp(plain, (moving,), (tangents,))[1]


def decode(blocks: Blocks, i, cell, q, shared: Shared, *, options: Options):
    """`kernels.write_read.decode`: one cell of each sequence changes, and the read is in place.

    The blocks are not even reshaped: where a loop carries them in another shape, XLA makes a copy
    at every step.
    """
    size = jax.tree.leaves(blocks.arrays)[0].shape[-2]
    i = i[:, 0]
    cells = jnp.where(i < 0, -1, i % size) if is_ring(options, size) else i
    arrays = write_one(blocks, cells, cell)
    # Without the barrier XLA fuses the write into each of its uses: a copy of the block for each.
    arrays = jax.lax.optimization_barrier(arrays)
    written = replace(blocks, arrays=arrays)
    return arrays, read(written, i[:, None], q, shared, options=options)


def read(blocks: Blocks, i, q, shared: Shared, *, options: Options):
    """`kernels.write_read.read`: tiles of the blocks are read where they lie."""
    blocks = _readable(blocks, q, options)
    if on_cpu.can_read(blocks, q, shared, options):
        return on_cpu.read(blocks, i, q, shared, options)
    size, where = jax.tree.leaves(blocks.arrays)[0].shape[-2], Where(i)
    if is_ring(options, size) and options.exact:
        blocks = Blocks(jax.tree.map(lambda x: in_order(x, i + 1), blocks.take()), batched=True)
        cells = consecutive(size - 1, i)
        where = Where(cells, q_starts=cells - i)
    elif is_ring(options, size):
        where = Where(i, ring_positions(i, size))
    return _forward(q, blocks, where, shared, options)[0]


def _readable(blocks, q, options):
    """The blocks, of floats where exact numerics read them."""
    if options.exact and any(map(is_int8, blocks.arrays)):
        return Blocks(floats(blocks.take(), q.dtype), batched=True)
    return blocks


def _forward(q, blocks, where, shared, options):
    """`attend` on blocks as they lie, without a gradient."""
    if many_queries.can_attend(q, blocks, where, shared, options):
        return many_queries.attend(q, blocks, where, shared, options)
    return _by_tiles(q, blocks, where, shared, options)


def _by_tiles(q, blocks, where, shared, options):
    """`_forward` in JAX's operations: tile by tile, so no copy is made."""
    if options.exact:
        return exact.forward(q, blocks, where, shared, options)
    keys, values = (jax.tree.leaves(x)[0] for x in blocks.arrays)
    num_kv_heads, num_cells = keys.shape[-3:-1]
    one_query = q.shape[1] == 1
    masking = _Masking(
        options,
        num_cells,
        where.kv_positions,
        shared.alibi,
        num_kv_heads,
        large=LARGE_KEY_TILE if one_query else None,
        # A product with the block as it lies needs no copy of tiles, and is twice as fast where
        # most cells are read. Narrow types would be widened first, a layer of a stack cut out.
        whole=one_query and blocks.layer is None and keys.dtype == jnp.float32,
    )

    def read(query):
        def step(begin, size, state):
            peak, total, mixed = state
            key, value = floats(masking.tile(blocks, begin, size), q.dtype)
            scores, visible, _ = masking.scores(query, key, begin)
            new_peak = _peak(peak, scores.max(-1))
            weights = jnp.where(visible, jnp.exp(scores - new_peak[..., None]), 0)
            shrink = jnp.exp(peak - new_peak)
            mixed = mixed * shrink[..., None] + _mix(weights, value)
            return new_peak, total * shrink + weights.sum(-1), mixed

        rows, dtype = query["q"].shape[:-1], _accumulator(q)
        state = jnp.full(rows, MASKED, dtype), jnp.zeros(rows, dtype)
        mixed = jnp.zeros((*rows, values.shape[-1]), dtype)
        state = vary_like((*state, mixed), q)
        peak, total, mixed = masking.loop(query, step, state)
        empty = total == 0
        if shared.sinks is not None:
            sink = _grouped_heads(shared.sinks.astype(dtype), num_kv_heads)
            new_peak = _peak(peak, sink)
            shrink = jnp.exp(peak - new_peak)
            mixed, total = mixed * shrink[..., None], total * shrink + jnp.exp(sink - new_peak)
            peak = new_peak
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
        return (mixed / total[..., None]).astype(q.dtype), lse

    queries = _tile_queries({"q": q}, where, num_kv_heads)
    several = _several(queries)
    return _untile(jax.lax.map(read, queries) if several else read(queries), q, several)


def _backward(residuals, cotangents):
    """Gradients of q, keys, values and sinks; weights are made again from the log-sum-exp."""
    (options, (q, keys, values, sinks), (where, alibi)), (z, lse) = residuals
    dz, dlse = cotangents
    dtype = _accumulator(q)
    # d loss / d score = weight * (d loss / d weight - delta); the log-sum-exp's own cotangent
    # enters the same way, since d lse / d score = weight.
    delta = jnp.einsum("btnh,btnh->btn", z, dz, preferred_element_type=dtype) - dlse
    dsinks = None
    if sinks is not None:
        # Where a query reads nothing, its results are constants and no weight goes to the sinks.
        weights = jnp.exp(sinks - jnp.where(jnp.isneginf(lse), jnp.inf, lse))
        dsinks = -jnp.einsum("btn,btn->n", weights, delta).astype(sinks.dtype)
    operands, fixed = (q, keys, values, dz, lse, delta), (where, alibi)
    gradients = _gradients(options, *vary_like((operands, fixed), (operands, fixed)))
    like = zip(gradients, (q, keys, values), strict=True)
    return (*(x.astype(y.dtype) for x, y in like), dsinks)


@jax.custom_jvp
def _gradients(options, operands, fixed):
    """The gradients of queries, keys and values."""
    q, keys, values, *_ = operands
    where, alibi = fixed
    blocks, shared = Blocks((keys, values), batched=True), Shared(alibi=alibi)
    plain = replace(options, exact=False)  # derivatives have no order to keep
    if many_queries.can_attend(q, blocks, where, shared, plain):
        return on_cpu_gradients(*operands, where, alibi, options)
    return _gradients_by_tiles(options, operands, fixed)


@_gradients.defjvp
def _gradients_jvp(primals, tangents):
    options, operands, fixed = primals
    by_tiles = lambda operands: _gradients_by_tiles(options, operands, fixed)
    return _gradients(*primals), jax.jvp(by_tiles, (operands,), (tangents[1],))[1]


def _gradients_by_tiles(options, operands, fixed):
    """`_gradients` in JAX's operations."""
    (q, keys, values, dz, lse, delta), (where, alibi) = operands, fixed
    num_kv_heads, dtype = keys.shape[1], _accumulator(q)
    blocks = Blocks((keys, values), batched=True)
    masking = _Masking(options, keys.shape[2], where.kv_positions, alibi, num_kv_heads)

    def read(gradients, query):
        def step(begin, size, state):
            dq, dkeys, dvalues = state
            key, value = masking.tile(blocks, begin, size)
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
    queries = _tile_queries(per_query, where, num_kv_heads)
    several = _several(queries)
    (dkeys, dvalues), dq = (
        jax.lax.scan(read, gradients, queries) if several else read(gradients, queries)
    )
    return _untile(dq, q, several), dkeys, dvalues


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

    def tile(self, blocks, begin, size):
        """Cells of the blocks from `begin` on: keys [B, K, size, H] and values [B, K, size, Hv]."""
        if blocks.layer is None and size == self.num_cells:
            return blocks.take()
        return blocks.tile(self.start(begin, size), size)

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
            scores -= self.slopes.astype(scores.dtype) * distance[:, None, :, None, :]
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


def _tile_queries(arrays, where, num_kv_heads):
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
    queries |= {"positions": tiled(where.q_positions, -1), "starts": tiled(where.q_starts)}
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


def _peak(a, b):
    """The larger of two, as a constant: results do not depend on what is subtracted.

    JAX derives a maximum by looking for what equals it, and finds nothing where XLA computes the
    same scores twice with other roundings.
    """
    return jax.lax.stop_gradient(jnp.maximum(a, b))


def _scores(q, key):
    """q [B, K, t, G, H] on a tile of keys [B, K, s, H] -> [B, K, t, G, s]."""
    if q.shape[2] * q.shape[3] > FEW:
        return _dot("bktgh,bksh->bktgs", q, key)
    # Keys first, as they lie: for few queries XLA would transpose the whole tile otherwise.
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
