"""Device functions that all attention kernels share: tiles, visibility, scores.

A query sees one interval of positions, `first..last`; causality, window, starts and padding all
come down to the two numbers of that interval, so they are data, never modes.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # kernels count in powers of two: exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
SCAN = tl.constexpr(1024)  # rows or cells looked at in one step of a search for visible tiles
FAR = tl.constexpr(2147483647)


@triton.jit
def load_rows(base, rows, stride, inside, H: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of H numbers, `stride` apart, as a tile [rows, WIDTH]; zero where not `inside`."""
    columns = tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=inside[:, None] & (columns[None, :] < H), other=0.0)


@triton.jit
def store_rows(base, rows, stride, inside, tile, H: tl.constexpr, WIDTH: tl.constexpr):
    """Writes a tile [rows, WIDTH] in the dtype of `base`."""
    columns = tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    mask = inside[:, None] & (columns[None, :] < H)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def query_intervals(q_positions, q_starts, rows, T, HAS_STARTS: tl.constexpr, WINDOW: tl.constexpr):
    """The positions `first..last` that each query row sees; empty for rows past T and padding."""
    inside = rows < T
    last = tl.load(q_positions + rows, mask=inside, other=-1)
    first = tl.full(rows.shape, 0, tl.int32)
    if HAS_STARTS:
        first = tl.maximum(first, tl.load(q_starts + rows, mask=inside, other=0))
    if WINDOW is not None:
        first = tl.maximum(first, last - (WINDOW - 1))
    return first, last


@triton.jit
def key_positions(kv_positions, cells, S, HAS_KV_POSITIONS: tl.constexpr):
    """The position in each cell; -1 past the block's end."""
    if HAS_KV_POSITIONS:
        return tl.load(kv_positions + cells, mask=cells < S, other=-1)
    return tl.where(cells < S, cells, -1)


@triton.jit
def needs_mask(start, full, BLOCK: tl.constexpr):
    """Whether some pair of the tile at `start` is invisible; everything is visible in `full`."""
    return (start < full[0]) | (start + BLOCK > full[1])


@triton.jit
def visible_keys(
    first, last, inside, kv_positions, S, HAS_KV_POSITIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """Which keys the rows of a query tile see.

    Returns three pairs: the cells low..high that some row sees, rounded down to a tile; the cells
    that every row sees; and the lowest and the highest position that some row sees.
    """
    some = inside & (first <= last)
    lowest = tl.min(tl.where(some, first, FAR))
    highest = tl.max(tl.where(some, tl.minimum(last, FAR - 1), -1))
    if HAS_KV_POSITIONS:
        low = S
        high = 0
        for start in range(0, S, SCAN):
            cells = start + tl.arange(0, SCAN)
            positions = key_positions(kv_positions, cells, S, True)
            seen = (positions >= lowest) & (positions <= highest)
            low = tl.minimum(low, tl.min(tl.where(seen, cells, FAR)))
            high = tl.maximum(high, tl.max(tl.where(seen, cells + 1, 0)))
        full_low = 0
        full_high = 0
    else:
        low = tl.minimum(lowest, S)
        high = tl.minimum(highest + 1, S)
        full_low = tl.max(tl.where(inside, first, 0))
        full_high = tl.minimum(tl.min(tl.where(inside, last, FAR - 1)) + 1, S)
    return (low // BLOCK * BLOCK, high), (full_low, full_high), (lowest, highest)


@triton.jit
def visible_queries(
    q_positions,
    q_starts,
    T,
    positions,
    HAS_STARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which queries see the keys at `positions`: the first two pairs of `visible_keys`."""
    lowest = tl.min(tl.where(positions >= 0, positions, FAR))
    highest = tl.max(positions)
    whole = tl.min(positions) >= 0
    low = T
    high = 0
    full_low = T
    full_high = 0
    full = 0
    for start in range(0, T, SCAN):
        rows = start + tl.arange(0, SCAN)
        first, last = query_intervals(q_positions, q_starts, rows, T, HAS_STARTS, WINDOW)
        some = (first <= last) & (last >= lowest) & (first <= highest)
        low = tl.minimum(low, tl.min(tl.where(some, rows, FAR)))
        high = tl.maximum(high, tl.max(tl.where(some, rows + 1, 0)))
        all_keys = whole & (last >= highest) & (first <= lowest)
        full_low = tl.minimum(full_low, tl.min(tl.where(all_keys, rows, FAR)))
        full_high = tl.maximum(full_high, tl.max(tl.where(all_keys, rows + 1, 0)))
        full += tl.sum(all_keys.to(tl.int32))
    # Positions may come in any order; only an unbroken run of rows can go without a mask.
    full_high = tl.where(full == full_high - full_low, full_high, full_low)
    return (low // BLOCK * BLOCK, high), (full_low, full_high)


@triton.jit
def scores(
    products,
    distance,
    slope,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """Scores of q.k `products`, up to a factor, and the soft cap's tanh (0 without one).

    The kernels' UNIT is the factor that makes a score a power of two: a plain score needs no
    arithmetic of its own, its scale joins the subtraction of the maximum.

    distance: i - p, same shape; slope: ALiBi's. Both are looked at only if HAS_ALIBI.
    """
    tanh = 0.0
    if SOFT_CAP is not None:
        bent = products * (SCALE / SOFT_CAP)
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(bent * (2.0 * LOG2E)))
        if SOFT_CAP > 100:
            # Near 0 the difference above loses digits, of a score SOFT_CAP * 6e-8; two terms of the
            # series keep them. They take registers, which caps as models have them can do without.
            tanh = tl.where(tl.abs(bent) < 0.03, bent - bent * bent * bent / 3.0, tanh)
        products = tanh * SOFT_CAP
    elif HAS_ALIBI:
        products = products * SCALE
    if HAS_ALIBI:
        products = products - slope * distance.to(tl.float32)
    return products, tanh
