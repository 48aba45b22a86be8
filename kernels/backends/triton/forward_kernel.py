"""Flash attention, forward (Dao, arXiv:2307.08691): one program per tile of queries of one head.

What reads tiles of keys, and what makes a result of the sums, serve `split_kernels` too.
"""

import triton
import triton.language as tl

from kernels.backends.triton.tiles import (
    LN2,
    LOG2E,
    key_positions,
    load_rows,
    needs_mask,
    query_intervals,
    scores,
    store_rows,
    visible_keys,
)


@triton.jit
def read_tiles(
    state,
    query,
    slope,
    intervals,
    visible,
    block,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_KV_POSITIONS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Runs the online softmax over the visible keys; state: (mixed, total, peak).

    intervals: the first and the last position that each row sees, and its own. In a RING position p
    lies in cell p % S.
    """
    mixed, total, peak = state
    first, last, own = intervals
    span, full, hull = visible
    low, high = span
    lowest, highest = hull
    keys, values, kv_positions, S = block
    for start in range(low, high, BLOCK_N):
        cells = start + tl.arange(0, BLOCK_N)
        if RING:
            positions = cells
            cells = cells % S
        else:
            positions = key_positions(kv_positions, cells, S, HAS_KV_POSITIONS)
        inside = (positions >= lowest) & (positions <= highest)
        key = load_rows(keys, cells, H, inside, H, WIDTH)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        distance = own[:, None] - positions[None, :]
        s, _ = scores(products, distance, slope, SCALE, SOFT_CAP, HAS_ALIBI)
        if needs_mask(start, full, BLOCK_N):
            seen = (positions[None, :] >= first[:, None]) & (positions[None, :] <= last[:, None])
            s = tl.where(seen, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * UNIT)
        # A row that has seen nothing yet must not subtract -inf from -inf.
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(s * UNIT - reference[:, None])
        shrink = tl.exp2(peak - reference)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(values, cells, HV, inside, HV, VALUE_WIDTH)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision=PRECISION)
        peak = new_peak
    return mixed, total, peak


@triton.jit
def finish(mixed, total, peak, sink, HAS_SINKS: tl.constexpr):
    """What rows read, and their log-sum-exp; sink: the logits of the sinks."""
    if HAS_SINKS:  # the sink joins where something is read, so that the rest is still known
        sink = tl.where(total == 0, float("-inf"), sink * LOG2E)
        new_peak = tl.maximum(peak, sink)
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - reference)
        total = total * shrink + tl.exp2(sink - reference)
        mixed *= shrink[:, None]
        peak = new_peak
    mixed /= tl.where(total == 0, 1.0, total)[:, None]
    return mixed, (peak + tl.log2(total)) * LN2


@triton.jit
def forward_kernel(
    q,
    keys,
    values,
    q_positions,
    kv_positions,
    q_starts,
    sinks,
    alibi,
    T,
    S,
    z,
    lse,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_KV_POSITIONS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q [B, T, N, H]; keys [B, K, S, H]; values [B, K, S, HV]; z [B, T, N, HV]; lse [B, N, T].

    sinks, alibi [B, N]. Programs: B * N * ceil(T / BLOCK_M). WIDTH and VALUE_WIDTH are H and HV
    rounded up to a power of two.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows of a causal text start first
    head = (tl.program_id(0) // tiles).to(tl.int64)  # of all B * N
    b = head // N
    n = head % N
    kv_head = b * K + n // (N // K)
    block = (keys + kv_head * S * H, values + kv_head * S * HV, kv_positions + b * S, S)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < T
    offsets = (b * T + rows) * N + n
    first, last = query_intervals(
        q_positions + b * T, q_starts + b * T, rows, T, HAS_STARTS, WINDOW
    )
    visible = visible_keys(first, last, inside, kv_positions + b * S, S, HAS_KV_POSITIONS, BLOCK_N)
    query = load_rows(q, offsets, H, inside, H, WIDTH)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + head)
    mixed = tl.full([BLOCK_M, VALUE_WIDTH], 0.0, tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    mixed, total, peak = read_tiles(
        (mixed, total, peak),
        query,
        slope,
        (first, last, last),
        visible,
        block,
        H=H,
        WIDTH=WIDTH,
        HV=HV,
        VALUE_WIDTH=VALUE_WIDTH,
        PRECISION=PRECISION,
        SCALE=SCALE,
        SOFT_CAP=SOFT_CAP,
        UNIT=UNIT,
        HAS_KV_POSITIONS=HAS_KV_POSITIONS,
        HAS_ALIBI=HAS_ALIBI,
        RING=False,
        BLOCK_N=BLOCK_N,
    )
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head)
    mixed, log_sum = finish(mixed, total, peak, sink, HAS_SINKS)
    store_rows(z, offsets, HV, inside, mixed, HV, VALUE_WIDTH)
    tl.store(lse + head * T + rows, log_sum, mask=inside)
