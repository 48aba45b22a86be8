"""A product of matrices in one order of sums: tiles of one size, and every sum over K in one go."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    x,
    w,
    M,
    y,
    K: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K] @ w [K, N] -> y [M, N]. Programs: ceil(M / BLOCK_M) * ceil(N / BLOCK_N).

    Neighbours have the same rows of x, and the columns of w beside each other.
    """
    tiles = (N + BLOCK_N - 1) // BLOCK_N
    rows = (tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for start in range(0, K, BLOCK_K):
        terms = start + tl.arange(0, BLOCK_K)
        left = (rows[:, None] < M) & (terms[None, :] < K)
        right = (terms[:, None] < K) & (columns[None, :] < N)
        a = tl.load(x + rows[:, None] * K + terms[None, :], mask=left, other=0.0)
        b = tl.load(w + terms.to(tl.int64)[:, None] * N + columns[None, :], mask=right, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y + rows[:, None] * N + columns[None, :], total, mask=inside)
