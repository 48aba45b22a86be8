"""Products of matrices in one order of sums, whatever the number of rows; see `order`."""

import functools

import jax
import jax.numpy as jnp

from kernels import ragged_dot
from kernels.backends import choice
from kernels.cpu.matmul import matmul
from kernels.cpu.tiles import TYPES
from kernels.dot import has_kernel
from kernels.exact.order import COLUMNS, ROWS, few_rows, order
from kernels.exact.sums import rounded

MOST = 512  # terms of one chain in a batch of products


def product(x, w):
    """x [M, K] @ w [K, N] -> [M, N], a row as if it were the only one.

    Narrow types are multiplied and summed in float32, which the result is in.
    """
    y = _by_kernel(x, w, "rows")
    if y is not None:
        return y
    x, w = _widened(x, w)
    (M, K), N = x.shape, w.shape[1]
    w = filled(w, 1)
    found = order(K, w.shape[1], x.dtype)
    if not found.block:
        y = _row_tiles(x, w)
    elif M == 1:
        y = _one_row(x, w, found.block)
    else:
        x = jnp.pad(x, ((0, max(ROWS - M, 0)), (0, 0)))
        y = x @ w if found.whole else _in_blocks(x, w, found.block)
    return rounded(y)[:M, :N]


def product_by_output(x, w):
    """`product` with a matrix that is stored as [N, K], of which few rows need no filling up."""
    y = _by_kernel(x, w, "columns")
    if y is not None:
        return y
    x, w = _widened(x, w)
    (M, K), N = x.shape, w.shape[0]
    w = filled(w, 0)
    least = order(K, w.shape[0], x.dtype).by_output
    if not least:
        return product(x, w.T)[:, :N]
    x = jnp.pad(x, ((0, max(least - M, 0)), (0, 0)))
    return rounded(x @ w.T)[:M, :N]


def _by_kernel(x, w, layout):
    """The product by a kernel with one order of sums, where this platform has one; or None."""
    matrix = w if layout == "rows" else w.T
    y = choice.product(x, matrix)
    if y is not None or not has_kernel() or w.dtype.name not in TYPES:
        return y
    block = _block(*matrix.shape)
    return matmul(x.astype(jnp.float32), w, block, layout) if block else None


def _block(K, N):
    """Terms of a chain of the kernel's sums, or None where no order is known."""
    return order(K, N + -N % COLUMNS, jnp.float32).block


def filled(w, axis):
    """w with zeros behind, so that along an axis it has as many columns as products take."""
    short = -w.shape[axis] % COLUMNS
    widths = [(0, 0)] * w.ndim
    widths[axis] = (0, short)
    return jnp.pad(w, widths)


def _widened(*arrays):
    wide = jnp.promote_types(arrays[0].dtype, jnp.float32)
    return [rounded(x.astype(wide)) for x in arrays]


def _one_row(x, w, block):
    K, N = w.shape
    if block >= K:
        return x @ w
    if K % block == 0:  # as a batch, for which the matrix is not copied
        parts = jnp.einsum("nmk,nkf->nmf", x.reshape(-1, 1, block), w.reshape(-1, block, N))
        return _add(rounded(parts))
    # A part of the matrix would be copied; with zeros for the terms of the others it is read whole.
    place = jnp.arange(K) // block
    return _add([rounded(jnp.where(place == n, x, 0) @ w) for n in range(-(-K // block))])


def _in_blocks(x, w, block):
    cut = range(0, len(w), block)
    return _add([rounded(x[:, k : k + block] @ w[k : k + block]) for k in cut])


def _add(parts):
    return functools.reduce(jnp.add, list(parts))


def _row_tiles(x, w):
    """Tiles of `ROWS` rows, one after the other: each is the same product."""
    tiles = jnp.pad(x, ((0, -len(x) % ROWS), (0, 0))).reshape(-1, ROWS, x.shape[1])
    return jax.lax.map(lambda tile: tile @ w, tiles).reshape(-1, w.shape[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def batched(x, w, turned=False):
    """x [B, M, K] @ w [B, K, N] -> [B, M, N], where w is [B, N, K] if `turned`.

    A row is as if it were the only one, and terms of zero change nothing, wherever they stand.
    Derivatives are those of a plain product.
    """
    M, K = x.shape[1:]
    N = w.shape[1 if turned else 2]
    w = filled(w, 1 if turned else 2)
    axis = 2 if turned else 1
    parts = []
    for k in range(0, K, MOST):
        size = min(MOST, K - k)
        part = jax.lax.slice_in_dim(w, k, k + size, axis=axis)
        parts.append(_batch(x[..., k : k + size], part, turned))
    return _add(parts)[:, :M, :N]


@batched.defjvp
def _batched_jvp(turned, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return batched(x, w, turned), _einsum(dx, w, turned) + _einsum(x, dw, turned)


def _einsum(x, w, turned):
    return jnp.einsum("bmk,bnk->bmn" if turned else "bmk,bkn->bmn", x, w)


def _batch(x, w, turned):
    rows = few_rows(x.shape[2], w.shape[1 if turned else 2], x.dtype, turned)
    if rows:
        x = jnp.pad(x, ((0, 0), (0, max(rows - x.shape[1], 0)), (0, 0)))
        return rounded(_einsum(x, w, turned))
    tiles = jnp.pad(x, ((0, 0), (0, -x.shape[1] % ROWS), (0, 0)))
    tiles = tiles.reshape(len(x), -1, ROWS, x.shape[2])
    one = lambda pair: jax.lax.map(
        lambda tile: rounded(_einsum(tile[None], pair[1][None], turned)[0]), pair[0]
    )
    return jax.lax.map(one, (tiles, w)).reshape(len(x), -1, w.shape[1 if turned else 2])


def grouped(x, w, sizes):
    """Rows [M, K], of which each group of `sizes` [X] takes a matrix of its own of w [X, K, N].

    As `jax.lax.ragged_dot`. By the kernel that `product` takes, or every group is cut into tiles of
    rows, which run one after the other.
    """
    if ragged_dot.has_kernel_for(w.dtype):
        block = _block(*w.shape[1:])
        if block:
            return ragged_dot.in_order(x.astype(jnp.float32), w, sizes, block)
    M, X = len(x), len(sizes)
    rows = 1 if X >= M else ROWS
    tiles = -(-sizes // rows)
    last_tile, last_row = jnp.cumsum(tiles), jnp.cumsum(sizes)
    begin = last_row - sizes

    def one(n):
        group = jnp.minimum(jnp.searchsorted(last_tile, n, side="right"), X - 1)
        within = (n - last_tile[group] + tiles[group]) * rows + jnp.arange(rows)
        picked = jnp.minimum(begin[group] + within, M - 1)
        return product(x[picked], jax.lax.dynamic_index_in_dim(w, group, keepdims=False))

    made = jax.lax.map(one, jnp.arange(M if rows == 1 else M // rows + X))
    group = jnp.minimum(jnp.searchsorted(last_row, jnp.arange(M), side="right"), X - 1)
    place = jnp.arange(M) - begin[group]
    tile = (last_tile - tiles)[group] + place // rows
    return made[tile, place % rows]
