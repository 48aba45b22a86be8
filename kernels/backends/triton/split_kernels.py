"""Attention with the cells split: for few queries, and for equal bits.

The query heads of one key head share a tile, so that a cell is loaded once for all of them. The
cells are split at multiples of SPLIT from an origin on: cell 0, or where equal bits are wanted, the
cell at which the query's document begins. What a query reads of each split is a part of its own,
and parts are merged in their order, where one of a split that it does not see changes nothing. So
neither the queries beside it nor the size of the block change what is summed up, or in which order.

Few queries have a program for each split, and `merge_kernel` merges; of many, each program merges
what it has read itself.
"""

import triton
import triton.language as tl

from kernels.backends.triton.forward_kernel import finish, read_tiles
from kernels.backends.triton.tiles import FAR, load_rows, store_rows


@triton.jit
def _merge(state, part):
    """The state (mixed, total, peak) of rows together with a part that comes after it."""
    mixed, total, peak = state
    more_mixed, more_total, more_peak = part
    new_peak = tl.maximum(peak, more_peak)
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - reference)
    grow = tl.exp2(more_peak - reference)
    empty = more_peak == float("-inf")
    total = tl.where(empty, total, total * shrink + more_total * grow)
    merged = mixed * shrink[:, None] + more_mixed * grow[:, None]
    return tl.where(empty[:, None], mixed, merged), total, new_peak


@triton.jit
def _read_split(
    split,
    query,
    slope,
    rows,
    block,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    RING: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The part (mixed, total, peak) that rows read of a split, counted from the first they see."""
    first, last, own, origin = rows
    begin = origin + ((first - origin) // SPLIT + split) * SPLIT
    first = tl.maximum(first, begin)
    last = tl.minimum(last, begin + (SPLIT - 1))
    some = first <= last
    mixed = tl.full([BLOCK_M, VALUE_WIDTH], 0.0, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start = tl.min(tl.where(some, origin, FAR))
    while start < FAR:  # the tiles of each document begin where it does
        mine = some & (origin == start)
        lowest = tl.min(tl.where(mine, first, FAR))
        highest = tl.max(tl.where(mine, last, -1))
        low = start + (lowest - start) // BLOCK_N * BLOCK_N
        mixed, total, peak = read_tiles(
            (mixed, total, peak),
            query,
            slope,
            (tl.where(mine, first, FAR), last, own),
            ((low, highest + 1), (0, 0), (lowest, highest)),
            block,
            H=H,
            WIDTH=WIDTH,
            HV=HV,
            VALUE_WIDTH=VALUE_WIDTH,
            PRECISION=PRECISION,
            SCALE=SCALE,
            SOFT_CAP=SOFT_CAP,
            UNIT=UNIT,
            HAS_KV_POSITIONS=False,
            HAS_ALIBI=HAS_ALIBI,
            RING=RING,
            BLOCK_N=BLOCK_N,
        )
        start = tl.min(tl.where(some & (origin > start), origin, FAR))
    return mixed, total, peak


@triton.jit
def split_kernel(
    q,
    keys,
    values,
    layer,
    q_positions,
    q_starts,
    sinks,
    alibi,
    T,
    S,
    splits,
    z,
    peaks,
    totals,
    L: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    FROM_START: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    RING: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q [B, T, N, H]; keys [B, L, K, S, H]; values [B, L, K, S, HV]; sinks, alibi [B, N].

    layer is a scalar. If WHOLE, z [B, T, N, HV], and peaks is the log-sum-exp [B, N, T]; programs:
    B * K * ceil(T * N / K / BLOCK_M). Else z is [B, T, N, splits, HV], with peaks and totals
    [B, T, N, splits], and there are `splits` times as many programs. Splits have their origin at
    starts if FROM_START.
    """
    group: tl.constexpr = N // K
    tiles = tl.cdiv(T * group, BLOCK_M)
    parts = 1 if WHOLE else splits
    tile = tiles - 1 - tl.program_id(0) // parts % tiles
    kv_head = (tl.program_id(0) // (parts * tiles)).to(tl.int64)  # of all B * K
    b = kv_head // K
    block = ((b * L + tl.load(layer)) * K + kv_head % K) * S

    members = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = members // group
    inside = tokens < T
    heads = kv_head % K * group + members % group  # of N
    rows = (b * T + tokens) * N + heads  # of all B * T * N
    own = tl.load(q_positions + b * T + tokens, mask=inside, other=-1)
    first = tl.full([BLOCK_M], 0, tl.int32)
    origin = first
    if HAS_STARTS:
        start = tl.load(q_starts + b * T + tokens, mask=inside, other=0)
        first = tl.maximum(first, start)
        if FROM_START:
            origin = start
    if WINDOW is not None:
        first = tl.maximum(first, own - (WINDOW - 1))
    last = own if RING else tl.minimum(own, S - 1)
    query = load_rows(q, rows, H, inside, H, WIDTH)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + b * N + heads, mask=inside, other=0.0)[:, None]

    mixed = tl.full([BLOCK_M, VALUE_WIDTH], 0.0, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    low = 0 if WHOLE else tl.program_id(0) % parts
    for split in range(low, splits if WHOLE else low + 1):
        part = _read_split(
            split,
            query,
            slope,
            (first, last, own, origin),
            (keys + block * H, values + block * HV, q_positions, S),
            H=H,
            WIDTH=WIDTH,
            HV=HV,
            VALUE_WIDTH=VALUE_WIDTH,
            SPLIT=SPLIT,
            PRECISION=PRECISION,
            SCALE=SCALE,
            SOFT_CAP=SOFT_CAP,
            UNIT=UNIT,
            RING=RING,
            HAS_ALIBI=HAS_ALIBI,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
        )
        mixed, total, peak = _merge((mixed, total, peak), part)
    if WHOLE:
        sink = 0.0
        if HAS_SINKS:
            sink = tl.load(sinks + b * N + heads, mask=inside, other=0.0)
        mixed, log_sum = finish(mixed, total, peak, sink, HAS_SINKS)
        store_rows(z, rows, HV, inside, mixed, HV, VALUE_WIDTH)
        tl.store(peaks + (b * N + heads) * T + tokens, log_sum, mask=inside)
    else:  # a split that saw nothing says so by its peak, and its sum is never read
        rows = rows * splits + low
        store_rows(z, rows, HV, inside & (total > 0), mixed, HV, VALUE_WIDTH)
        tl.store(peaks + rows, peak, mask=inside)
        tl.store(totals + rows, total, mask=inside)


@triton.jit
def merge_kernel(
    parts,
    peaks,
    totals,
    sinks,
    rows,
    T,
    splits,
    z,
    lse,
    N: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merges parts [B, T, N, splits, HV], peaks and totals [B, T, N, splits], one after the other.

    z [B, T, N, HV]; lse [B, N, T]; sinks [B, N]; rows is B * T * N. Programs: ceil(rows / BLOCK_M).
    """
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    mixed = tl.full([BLOCK_M, VALUE_WIDTH], 0.0, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, splits):
        part = row * splits + split
        part_peak = tl.load(peaks + part, mask=inside, other=float("-inf"))
        part_total = tl.load(totals + part, mask=inside, other=0.0)
        seen = part_peak > float("-inf")
        part_mixed = load_rows(parts, part, HV, seen, HV, VALUE_WIDTH)
        mixed, total, peak = _merge((mixed, total, peak), (part_mixed, part_total, part_peak))
    head = row // (T * N) * N + row % N  # of all B * N
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0)
    mixed, log_sum = finish(mixed, total, peak, sink, HAS_SINKS)
    store_rows(z, row, HV, inside, mixed, HV, VALUE_WIDTH)
    tl.store(lse + head * T + row // N % T, log_sum, mask=inside)
