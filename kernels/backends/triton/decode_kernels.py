"""Decode: one launch writes the new cell of each sequence in place and reads the cells before it.

The cells are split over programs at fixed places, so that one sequence can fill a GPU. A program
that reads a split never reads the new cell: the program whose split holds it takes it from the
arguments and writes it, so that no program waits for another. A second, small kernel merges the
splits in their order (Dao et al., Flash-Decoding, 2023).
"""

import triton
import triton.language as tl

from kernels.backends.triton.tiles import LOG2E, load_rows, scores, store_rows


@triton.jit
def _read(
    state,
    query,
    slope,
    block,
    cells,
    token,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    HV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    RING: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Runs the online softmax over `cells` without the token's; state: (mixed, total, peak)."""
    mixed, total, peak = state
    keys, values, S = block
    low, high = cells
    first, position, slot = token
    for start in range(low, high, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        positions = slots
        if RING:
            positions = position - slot + slots - tl.where(slots > slot, S, 0)
        seen = (positions >= first) & (positions < position) & (slots < S)
        key = load_rows(keys, slots, H, seen, H, WIDTH)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        distance = (position - positions)[None, :]
        s, _ = scores(products, distance, slope[:, None], SCALE, SOFT_CAP, HAS_ALIBI)
        s = tl.where(seen[None, :], s * UNIT, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(peak - reference)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(values, slots, HV, seen, HV, VALUE_WIDTH)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(value.dtype), value, mixed, input_precision=PRECISION)
        peak = new_peak
    return mixed, total, peak


@triton.jit
def decode_kernel(
    keys,
    values,
    layer,
    cells,
    starts,
    k,
    v,
    q,
    sinks,
    alibi,
    S,
    keys_out,
    values_out,
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
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UNIT: tl.constexpr,
    RING: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """keys and keys_out (the same buffer) [B, L, K, S, H]; values, values_out [B, L, K, S, HV].

    layer is a scalar; cells, starts [B]; k [B, K, H]; v [B, K, HV]; q [B, N, H]; sinks, alibi [N].
    z [B, N, splits, HV] with peaks and totals [B, N, splits], where one split is already the
    result. A negative cell writes and reads nothing. Programs: B * K * ceil(N / K / GROUP) *
    ceil(S / SPLIT), each for GROUP query heads of a key head.
    """
    splits = tl.cdiv(S, SPLIT)
    split = tl.program_id(0) % splits
    groups: tl.constexpr = (N // K + GROUP - 1) // GROUP
    group = tl.program_id(0) // splits % groups
    kv_head = (tl.program_id(0) // (splits * groups)).to(tl.int64)  # of all B * K
    b = kv_head // K
    block = ((b * L + tl.load(layer)) * K + kv_head % K) * S
    keys += block * H
    values += block * HV

    position = tl.load(cells + b)
    first = tl.full([], 0, tl.int32)
    if HAS_STARTS:
        first = tl.maximum(first, tl.load(starts + b))
    if WINDOW is not None:
        first = tl.maximum(first, position - (WINDOW - 1))
    slot = position % S if RING else position

    members = group * GROUP + tl.arange(0, GROUP)
    real = members < N // K
    heads = kv_head * (N // K) + members  # of all B * N
    query = load_rows(q, heads, H, real, H, WIDTH)
    slope = tl.full([GROUP], 0.0, tl.float32)
    if HAS_ALIBI:
        slope = tl.load(alibi + heads % N, mask=real, other=0.0)
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.full([GROUP], 0.0, tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + heads % N, mask=real, other=0.0) * LOG2E
        peak = tl.where(split == 0, sink, peak)
        total = tl.where(split == 0, 1.0, total)

    columns = tl.arange(0, WIDTH)
    key = tl.load(k + kv_head * H + columns, mask=columns < H, other=0.0)
    value_columns = tl.arange(0, VALUE_WIDTH)
    value = tl.load(v + kv_head * HV + value_columns, mask=value_columns < HV, other=0.0)
    mine = (position >= 0) & (slot < S) & (slot // SPLIT == split)
    new_cell = block + slot
    written = mine & (group == 0)
    tl.store(keys_out + new_cell * H + columns, key, mask=written & (columns < H))
    tl.store(values_out + new_cell * HV + value_columns, value, mask=written & (value_columns < HV))

    products = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    s, _ = scores(products, tl.full([GROUP], 0, tl.int32), slope, SCALE, SOFT_CAP, HAS_ALIBI)
    s = tl.where(mine & (first <= position), s * UNIT, float("-inf"))
    new_peak = tl.maximum(peak, s)
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(s - reference)
    total = total * tl.exp2(peak - reference) + weights
    mixed = weights[:, None] * value.to(tl.float32)[None, :]

    low = first
    high = tl.minimum(position, S)
    if RING:  # once the ring is full, any cell may be in the window
        low = tl.where(position >= S, 0, low)
        high = tl.where(position >= S, S, high)
    low = tl.maximum(low // BLOCK_N * BLOCK_N, split * SPLIT)
    high = tl.minimum(high, split * SPLIT + SPLIT)
    mixed, total, peak = _read(
        (mixed, total, new_peak),
        query,
        slope,
        (keys, values, S),
        (low, high),
        (first, position, slot),
        H=H,
        WIDTH=WIDTH,
        HV=HV,
        VALUE_WIDTH=VALUE_WIDTH,
        PRECISION=PRECISION,
        SCALE=SCALE,
        SOFT_CAP=SOFT_CAP,
        UNIT=UNIT,
        RING=RING,
        HAS_ALIBI=HAS_ALIBI,
        BLOCK_N=BLOCK_N,
    )

    if splits == 1:
        mixed /= tl.where(total == 0, 1.0, total)[:, None]
        store_rows(z, heads, HV, real, mixed, HV, VALUE_WIDTH)
    else:  # a split that saw nothing says so by its peak, and its sum is never read
        parts = heads * splits + split
        store_rows(z, parts, HV, real & (total > 0), mixed, HV, VALUE_WIDTH)
        tl.store(peaks + parts, peak, mask=real)
        tl.store(totals + parts, total, mask=real)


@triton.jit
def combine_kernel(
    parts,
    peaks,
    totals,
    z,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merges parts [B, N, SPLITS, H], peaks and totals [B, N, SPLITS] into z [B, N, H].

    Programs: B * N. PADDED_SPLITS is SPLITS rounded up to a power of two.
    """
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    splits = tl.arange(0, PADDED_SPLITS)
    exists = splits < SPLITS
    all_peaks = tl.load(peaks + head * SPLITS + splits, mask=exists, other=float("-inf"))
    all_totals = tl.load(totals + head * SPLITS + splits, mask=exists, other=0.0)
    highest = tl.max(all_peaks)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(all_peaks - highest) * all_totals)
    mixed = tl.full([WIDTH], 0.0, tl.float32)
    for start in range(0, SPLITS, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        peak = tl.load(peaks + head * SPLITS + rows, mask=rows < SPLITS, other=float("-inf"))
        weights = tl.exp2(peak - highest)
        part = load_rows(parts, head * SPLITS + rows, H, weights > 0, H, WIDTH)
        mixed += tl.sum(part * weights[:, None], 0)
    mixed /= tl.where(total == 0, 1.0, total)
    tl.store(z + head * H + columns, mixed.to(z.dtype.element_ty), mask=columns < H)
