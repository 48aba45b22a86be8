"""Flash attention, backward: one kernel for dq, one for dk and dv, neither with atomics.

Both recompute the weights from the log-sum-exp. With `delta` the sum of z * dz over a row, less the
log-sum-exp's own cotangent, d loss / d score = weight * (d loss / d weight - delta).
"""

import triton
import triton.language as tl

from kernels.backends.triton.tiles import (
    LOG2E,
    key_positions,
    load_rows,
    needs_mask,
    query_intervals,
    scores,
    store_rows,
    visible_keys,
    visible_queries,
)


@triton.jit
def _weights_and_dscores(
    products,
    dweights,
    distance,
    lse,
    delta,
    slope,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """The weights, and the gradient of q.k, of one tile where all is visible.

    `lse` counts in powers of two, `delta` is multiplied by SCALE already: what is left of the scale
    joins the subtraction, and float16 rounds numbers of the size of the result.
    """
    s, tanh = scores(products, distance, slope, SCALE, SOFT_CAP, HAS_ALIBI)
    weights = tl.exp2(s * UNIT - lse)
    dscores = weights * (dweights * SCALE - delta)
    if SOFT_CAP is not None:
        dscores *= 1.0 - tanh * tanh
    return weights, dscores


@triton.jit
def _read_dq(
    rows,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient [BLOCK_M, WIDTH] of the query, summed over the visible keys."""
    query, dz, lse, delta = rows
    first, last = intervals
    span, full, hull = visible
    low, high = span
    lowest, highest = hull
    keys, values, kv_positions, S = block
    dq = tl.full([BLOCK_M, WIDTH], 0.0, tl.float32)
    for start in range(low, high, BLOCK_N):
        cells = start + tl.arange(0, BLOCK_N)
        positions = key_positions(kv_positions, cells, S, HAS_KV_POSITIONS)
        inside = (positions >= lowest) & (positions <= highest)
        key = load_rows(keys, cells, H, inside, H, WIDTH)
        value = load_rows(values, cells, HV, inside, HV, VALUE_WIDTH)
        _, dscores = _weights_and_dscores(
            tl.dot(query, tl.trans(key), input_precision=PRECISION),
            tl.dot(dz, tl.trans(value), input_precision=PRECISION),
            last[:, None] - positions[None, :],
            lse[:, None],
            delta[:, None],
            slope,
            SCALE,
            SOFT_CAP,
            UNIT,
            HAS_ALIBI,
        )
        if needs_mask(start, full, BLOCK_N):
            seen = (positions[None, :] >= first[:, None]) & (positions[None, :] <= last[:, None])
            dscores = tl.where(seen, dscores, 0.0)
        dq = tl.dot(dscores.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q,
    keys,
    values,
    q_positions,
    kv_positions,
    q_starts,
    alibi,
    dz,
    lse,
    delta,
    T,
    S,
    dq,
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
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q, dq [B, T, N, H]; dz [B, T, N, HV]; keys [B, K, S, H]; values [B, K, S, HV].

    lse, delta [B, N, T]; alibi [B, N]. Programs: B * N * ceil(T / BLOCK_M).
    """
    tiles = tl.cdiv(T, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
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
    per_row = (
        load_rows(q, offsets, H, inside, H, WIDTH),
        load_rows(dz, offsets, HV, inside, HV, VALUE_WIDTH),
        tl.load(lse + head * T + rows, mask=inside, other=0.0) * LOG2E,
        tl.load(delta + head * T + rows, mask=inside, other=0.0) * SCALE,
    )
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi + head)
    total = _read_dq(
        per_row,
        slope,
        (first, last),
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
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
    )
    store_rows(dq, offsets, H, inside, total, H, WIDTH)


@triton.jit
def _read_dkdv(
    gradients,
    tile,
    slope,
    per_head,
    per_query,
    visible,
    N: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds to (dk, dv) what the queries of one head give; scores here are [keys, queries]."""
    dk, dv = gradients
    key, value, positions = tile
    q, dz, lse, delta = per_head
    q_positions, q_starts, T = per_query
    span, full = visible
    low, high = span
    for start in range(low, high, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < T
        offsets = rows.to(tl.int64) * N
        query = load_rows(q, offsets, H, inside, H, WIDTH)
        dz_tile = load_rows(dz, offsets, HV, inside, HV, VALUE_WIDTH)
        distance = 0
        if HAS_ALIBI:
            last = tl.load(q_positions + rows, mask=inside, other=-1)
            distance = last[None, :] - positions[:, None]
        lse_row = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
        delta_row = tl.load(delta + rows, mask=inside, other=0.0) * SCALE
        weights, dscores = _weights_and_dscores(
            tl.dot(key, tl.trans(query), input_precision=PRECISION),
            tl.dot(value, tl.trans(dz_tile), input_precision=PRECISION),
            distance,
            lse_row[None, :],
            delta_row[None, :],
            slope,
            SCALE,
            SOFT_CAP,
            UNIT,
            HAS_ALIBI,
        )
        if needs_mask(start, full, BLOCK_M):
            first, last = query_intervals(q_positions, q_starts, rows, T, HAS_STARTS, WINDOW)
            seen = (positions[:, None] >= first[None, :]) & (positions[:, None] <= last[None, :])
            # Both, because what is not seen may be anything, infinite too.
            weights = tl.where(seen, weights, 0.0)
            dscores = tl.where(seen, dscores, 0.0)
        dv = tl.dot(weights.to(dz_tile.dtype), dz_tile, dv, input_precision=PRECISION)
        dk = tl.dot(dscores.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    q,
    keys,
    values,
    q_positions,
    kv_positions,
    q_starts,
    alibi,
    dz,
    lse,
    delta,
    T,
    S,
    dkeys,
    dvalues,
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
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q [B, T, N, H]; dz [B, T, N, HV]; keys, dkeys [B, K, S, H]; values, dvalues [B, K, S, HV].

    lse, delta [B, N, T]; alibi [B, N]. Programs: B * K * ceil(S / BLOCK_N), each for all query
    heads of its key head.
    """
    tiles = tl.cdiv(S, BLOCK_N)
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)  # of all B * K
    b = kv_head // K
    group: tl.constexpr = N // K
    cells = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = key_positions(kv_positions + b * S, cells, S, HAS_KV_POSITIONS)
    visible = visible_queries(
        q_positions + b * T, q_starts + b * T, T, positions, HAS_STARTS, WINDOW, BLOCK_M
    )
    offsets = kv_head * S + cells
    held = positions >= 0
    tile = (
        load_rows(keys, offsets, H, held, H, WIDTH),
        load_rows(values, offsets, HV, held, HV, VALUE_WIDTH),
        positions,
    )
    dk = tl.full([BLOCK_N, WIDTH], 0.0, tl.float32)
    dv = tl.full([BLOCK_N, VALUE_WIDTH], 0.0, tl.float32)
    for member in range(group):
        n = (kv_head % K) * group + member
        head = b * N + n
        start = b * T * N + n
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi + head)
        dk, dv = _read_dkdv(
            (dk, dv),
            tile,
            slope,
            (q + start * H, dz + start * HV, lse + head * T, delta + head * T),
            (q_positions + b * T, q_starts + b * T, T),
            visible,
            N=N,
            H=H,
            WIDTH=WIDTH,
            HV=HV,
            VALUE_WIDTH=VALUE_WIDTH,
            PRECISION=PRECISION,
            SCALE=SCALE,
            WINDOW=WINDOW,
            SOFT_CAP=SOFT_CAP,
            UNIT=UNIT,
            HAS_STARTS=HAS_STARTS,
            HAS_ALIBI=HAS_ALIBI,
            BLOCK_M=BLOCK_M,
        )
    store_rows(dkeys, offsets, H, cells < S, dk, H, WIDTH)
    store_rows(dvalues, offsets, HV, cells < S, dv, HV, VALUE_WIDTH)
