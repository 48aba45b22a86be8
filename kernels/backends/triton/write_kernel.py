"""The cells of a chunk, written where each row of a batch has come to: one launch, in place."""

import triton
import triton.language as tl

from kernels.backends.triton.tiles import load_rows, store_rows


@triton.jit
def write_kernel(
    block,
    layer,
    cells,
    new,
    S,
    T,
    block_out,
    L: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """block and block_out (the same buffer) [B, L, K, S, H]; cells [B, T]; new [B, T, K, H].

    layer is a scalar. A cell outside of the block is not written. Programs: B * K * ceil(T /
    BLOCK_M).
    """
    tiles = tl.cdiv(T, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)  # of all B * K
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = head // K * T + rows  # of all B * T
    slots = tl.load(cells + tokens, mask=rows < T, other=-1)
    inside = (slots >= 0) & (slots < S)
    written = load_rows(new, tokens * K + head % K, H, inside, H, WIDTH)
    block_head = (head // K * L + tl.load(layer)) * K + head % K
    store_rows(block_out, block_head * S + slots, H, inside, written, H, WIDTH)
