"""Products of matrices in one order of sums, for exact numerics."""

import jax
import jax.numpy as jnp

from kernels.backends.triton.adapter import call
from kernels.backends.triton.launches import bits, launch
from kernels.backends.triton.product_kernel import product_kernel
from kernels.tracing.partition import split_by_rows_and_heads
from kernels.tracing.target import architecture

BLOCK_K = 128  # bytes of a row that are multiplied at a time


def product(x, w, *, on: int | None = None):
    """x [M, K] @ w [K, N], a row as if it were the only one.

    However many rows there are, the same program computes a tile of them, and sums over K in the
    same order. float32 is multiplied as TF32 unless `jax_default_matmul_precision` says otherwise.

    Args:
      x, w: both float32, bfloat16 or float16.
      on: as in `kernels.backends.triton.decode`.

    Returns:
      [M, N] float32.

    Raises:
      NotImplementedError: the kernel does not take the dtype.
    """
    on = architecture() if on is None else on
    launch("product", on, 1, x.dtype)
    if x.dtype != w.dtype:
        raise NotImplementedError(f"it multiplies one dtype; got {x.dtype} and {w.dtype}.")
    run = lambda x, w: [_product(on, x[:, 0], w[0])]
    # As `kernels.tracing.partition` wants them: with an axis of heads, of which there is one.
    return split_by_rows_and_heads(run, (x[:, None], w[None]), ("bnx", "kxy"), ("by",))[0]


def _product(on, x, w):
    (M, K), N = x.shape, w.shape[1]
    tile = launch("product", on, 1, x.dtype)
    return call(
        product_kernel,
        x,
        w,
        M,
        outputs=[jax.ShapeDtypeStruct((M, N), jnp.float32)],
        programs=-(-M // tile.block_m) * -(-N // tile.block_n),
        launch=tile,
        architecture=on,
        contract=False,
        K=K,
        N=N,
        PRECISION="tf32" if bits(x.dtype) == 19 else "ieee",
        BLOCK_K=BLOCK_K // x.dtype.itemsize,
    )[0]
