"""Products of matrices in one order of sums, whatever the number of rows; see `order`."""

import functools

import jax
import jax.numpy as jnp

from kernels.exact.order import COLUMNS, ROWS, few_rows, order
from kernels.exact.sums import apart

MOST = 512  # terms of one chain in a batch of products


def product(x, w):
    """x [M, K] @ w [K, N] -> [M, N], a row as if it were the only one."""
    (M, K), N = x.shape, w.shape[1]
    w = jnp.pad(w, ((0, 0), (0, -N % COLUMNS)))
    found = order(K, w.shape[1], x.dtype)
    x = apart(x)
    if not found.block:
        y = _row_tiles(x, w)
    elif M == 1:
        y = _one_row(x, w, found.block)
    else:
        x = jnp.pad(x, ((0, max(ROWS - M, 0)), (0, 0)))
        y = x @ w if found.whole else _in_blocks(x, w, found.block)
    return apart(y)[:M, :N]


def _one_row(x, w, block):
    K, N = w.shape
    if block >= K:
        return x @ w
    if K % block:
        return _in_blocks(x, w, block)
    # As a batch, for which the matrix is not copied.
    parts = jnp.einsum("nmk,nkf->nmf", x.reshape(-1, 1, block), w.reshape(-1, block, N))
    return _add(apart(parts))


def _in_blocks(x, w, block):
    cut = range(0, len(w), block)
    return _add([apart(x[:, k : k + block] @ w[k : k + block]) for k in cut])


def _add(parts):
    return functools.reduce(jnp.add, list(parts))


def _row_tiles(x, w):
    """Tiles of `ROWS` rows, one after the other: each is the same product."""
    tiles = jnp.pad(x, ((0, -len(x) % ROWS), (0, 0))).reshape(-1, ROWS, x.shape[1])
    return jax.lax.map(lambda tile: apart(apart(tile) @ w), tiles).reshape(-1, w.shape[1])


def batched(x, w, *, turned=False):
    """x [B, M, K] @ w [B, K, N] -> [B, M, N], where w is [B, N, K] if `turned`.

    A row is as if it were the only one, and terms of zero change nothing, wherever they stand.
    """
    M, K = x.shape[1:]
    N = w.shape[1 if turned else 2]
    w = jnp.pad(w, ((0, 0), (0, -N % COLUMNS * turned), (0, -N % COLUMNS * (not turned))))
    axis = 2 if turned else 1
    x = apart(x)
    parts = []
    for k in range(0, K, MOST):
        size = min(MOST, K - k)
        part = jax.lax.slice_in_dim(w, k, k + size, axis=axis)
        parts.append(_batch(x[..., k : k + size], part, turned))
    return _add(parts)[:, :M, :N]


def _batch(x, w, turned):
    subscripts = "bmk,bnk->bmn" if turned else "bmk,bkn->bmn"
    rows = few_rows(x.shape[2], w.shape[1 if turned else 2], x.dtype)
    if rows:
        x = jnp.pad(x, ((0, 0), (0, max(rows - x.shape[1], 0)), (0, 0)))
        return apart(jnp.einsum(subscripts, x, w))
    tiles = jnp.pad(x, ((0, 0), (0, -x.shape[1] % ROWS), (0, 0)))
    tiles = tiles.reshape(len(x), -1, ROWS, x.shape[2])
    one = lambda pair: jax.lax.map(
        lambda tile: apart(jnp.einsum(subscripts, apart(tile)[None], pair[1][None])[0]), pair[0]
    )
    return jax.lax.map(one, (tiles, w)).reshape(len(x), -1, w.shape[1 if turned else 2])
