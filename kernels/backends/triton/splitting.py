"""Attention with the cells split, on blocks as they lie: few queries, or one order of sums."""

import jax
import jax.numpy as jnp

from kernels.backends.triton.adapter import call
from kernels.backends.triton.launches import launch, score_constants, split_size, width
from kernels.backends.triton.split_kernels import merge_kernel, split_kernel

FEW = 64  # queries, for which a program for each split pays
EXACT_SPLIT = 512  # cells, whatever the batch and the block


def read(options, on, q, keys, values, layer, sinks, q_positions, q_starts, alibi, *, ring=False):
    """Reads blocks in place, on one device.

    Args:
      options, on: as in `kernels.backends.triton.attention.attend`.
      q: [B, T, N, H].
      keys, values: [B, K, S, H] and [B, K, S, Hv], or with an axis of L layers before K, and
        without one of sequences if B is 1.
      layer: a scalar int32, the one of the layers; None if there is no such axis.
      sinks, alibi: [B, N] float32, or None.
      q_positions, q_starts: [B, T] int32; q_starts may be None.
      ring: whether position p lies in cell p % S.

    Returns:
      z [B, T, N, Hv] in q's dtype and the log-sum-exp [B, N, T], as `attend` has them.
    """
    B, T, N, H = q.shape
    *_, K, S, _ = keys.shape
    HV = values.shape[-1]
    tile = launch("split", on, max(H, HV), keys.dtype)
    tiles = -(-T * (N // K) // tile.block_m)
    size = EXACT_SPLIT if options.exact else split_size(on, B * K * tiles, S)
    span = S if options.window is None else min(S, options.window)
    # One split more than their number where what is seen need not begin with a split.
    unaligned = options.window is not None or (options.exact and q_starts is not None)
    splits = -(-span // size) + unaligned
    whole = T > FEW or splits == 1
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    parts = () if whole else (splits,)
    z, peaks, totals = call(
        split_kernel,
        q,
        keys,
        values,
        jnp.int32(0) if layer is None else layer,
        q_positions,
        q_starts,
        sinks,
        alibi,
        T,
        S,
        splits,
        outputs=[
            shape(B, T, N, *parts, HV, dtype=q.dtype if whole else jnp.float32),
            shape(B, N, T) if whole else shape(B, T, N, splits),
            shape(1) if whole else shape(B, T, N, splits),
        ],
        programs=B * K * tiles * (1 if whole else splits),
        launch=tile,
        architecture=on,
        contract=not options.exact,
        L=1 if layer is None else keys.shape[-4],
        N=N,
        K=K,
        SPLIT=size,
        WHOLE=whole,
        FROM_START=options.exact,
        RING=ring,
        HAS_STARTS=q_starts is not None,
        HAS_SINKS=sinks is not None,
        **score_constants(options, on, H, HV, keys.dtype, alibi),
    )
    if whole:
        return z, peaks
    tile = launch("merge", on, HV, jnp.float32)
    return call(
        merge_kernel,
        z,
        peaks,
        totals,
        sinks,
        B * T * N,
        T,
        splits,
        outputs=[shape(B, T, N, HV, dtype=q.dtype), shape(B, N, T)],
        programs=-(-B * T * N // tile.block_m),
        launch=tile,
        architecture=on,
        contract=not options.exact,
        N=N,
        HV=HV,
        VALUE_WIDTH=width(HV),
        HAS_SINKS=sinks is not None,
    )
