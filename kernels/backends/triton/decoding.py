"""The instruction for one token of each sequence: write one cell, read the cells up to it."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kernels.backends.triton.adapter import call
from kernels.backends.triton.attention import check_exact
from kernels.backends.triton.decode_kernels import combine_kernel, decode_kernel
from kernels.backends.triton.launches import (
    MULTIPLE,
    launch,
    power_of_two,
    score_constants,
    split_size,
    width,
)
from kernels.backends.triton.splitting import read as read_splits
from kernels.backends.triton.writing import write_one
from kernels.blocks import Blocks
from kernels.cells import is_ring
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.partition import split_by_rows_and_heads
from kernels.tracing.target import architecture


def decode(
    blocks: Blocks,
    i,
    cell,
    q,
    shared: Shared,
    *,
    options: Options,
    on: int | None = None,
):
    """Writes one new cell of each sequence into one layer's block in place, then reads.

    Products are in the dtype of the blocks and sums in float32. There is no gradient and no
    batching rule: sequences are the leading axis of every array.

    Args:
      blocks: the blocks of keys and values, which are written in place and must be donated. A
        block of `options.window` cells is a ring, in which position p lies in cell p % window.
      i: [B or 1, 1] int32, the position of each token. A token at a negative position writes
        nothing and reads nothing.
      cell: (k [B, 1, K, H], v [B, 1, K, Hv]).
      q: [B, 1, N, H].
      shared: the sinks and the slopes of ALiBi.
      options: scale, window and soft cap.
      on: the architecture to compile for, ten times the compute capability; if None, that of
        `kernels.tracing.target.architecture`.

    Returns:
      (keys, values) with the new cells, and z [B, 1, N, Hv] in q's dtype.

    Raises:
      NotImplementedError: the head size, dtype or architecture is not in the table of launches, or
        a head size is not a multiple of 8.
    """
    on = architecture() if on is None else on
    (keys, values), (k, v), layer = blocks.arrays, cell, blocks.layer
    _check_in_place(keys, values)
    if options.exact:
        check_exact(q, keys, values, Where(i))
        S = keys.shape[-2]
        cells = jnp.where(i < 0, -1, i % S) if is_ring(options, S) else i
        written = replace(blocks, arrays=write_one(blocks, cells[:, 0], cell, on))
        return written.arrays, read(written, i, q, shared, options=options, on=on)
    block = _axes(blocks)
    operands = {
        "q": (q, "btnh"),
        "k": (k, "btkh"),
        "v": (v, "btkh"),
        "keys": (keys, block),
        "values": (values, block),
        "layer": (None if layer is None else jnp.asarray(layer, jnp.int32), ""),
        "cells": (jnp.broadcast_to(i[:, 0].astype(jnp.int32), q.shape[:1]), "b"),
        "sinks": (shared.sinks, "n"),
        "alibi": (shared.alibi, "n"),
    }
    arrays, axes = zip(*operands.values(), strict=True)
    step = lambda *arrays: _step(options, on, **dict(zip(operands, arrays, strict=True)))
    keys, values, z = split_by_rows_and_heads(step, arrays, axes, (block, block, "btnh"))
    return (keys, values), z


def read(blocks: Blocks, i, q, shared: Shared, *, options: Options, on: int | None = None):
    """`kernels.write_read.read`: the blocks are read where they lie.

    Args and raises as in `decode`.
    """
    on = architecture() if on is None else on
    keys, values = blocks.arrays
    _check_in_place(keys, values)
    B, _, N, _ = q.shape
    heads = lambda x: None if x is None else jnp.broadcast_to(x.astype(jnp.float32), (B, N))
    operands = {
        "q": (q.astype(keys.dtype), "btnh"),
        "keys": (keys, _axes(blocks)),
        "values": (values, _axes(blocks)),
        "layer": (None if blocks.layer is None else jnp.asarray(blocks.layer, jnp.int32), ""),
        "sinks": (heads(shared.sinks), "bn"),
        "q_positions": (jnp.broadcast_to(i.astype(jnp.int32), (B, 1)), "bt"),
        "alibi": (heads(shared.alibi), "bn"),
    }
    ring = is_ring(options, keys.shape[-2])

    def step(*arrays):
        named = dict(zip(operands, arrays, strict=True))
        return read_splits(options, on, **named, q_starts=None, ring=ring)[:1]

    arrays, axes = zip(*operands.values(), strict=True)
    (z,) = split_by_rows_and_heads(step, arrays, axes, ("btnh",))
    return z.astype(q.dtype)


def _check_in_place(keys, values):
    if keys.shape[-1] % MULTIPLE or values.shape[-1] % MULTIPLE:
        raise NotImplementedError(
            f"heads of {keys.shape[-1]} and {values.shape[-1]} numbers cannot be read in place: "
            f"both sizes must be multiples of {MULTIPLE}."
        )


def _axes(blocks):
    return "b" * blocks.batched + "l" * (blocks.layer is not None) + "ksh"


def _step(options, on, q, k, v, keys, values, layer, cells, sinks, alibi):
    """One step on one device; cells [B]."""
    *_, K, S, H = keys.shape  # to a kernel they are one stretch of memory; no reshape, no copy
    HV = values.shape[-1]
    B, _, N, _ = q.shape
    tile = launch("decode", on, max(H, HV), keys.dtype)
    split = split_size(on, B * K, S)
    splits = -(-S // split)
    # Query heads of one key head that share a program: a tile of 8192 numbers at most, for which
    # the launches of the table have registers and shared memory.
    largest = max(tile.block_m, 8192 // width(max(H, HV)))
    group = min(max(tile.block_m, power_of_two(N // K)), largest)

    def heads(x):
        return None if x is None else x.astype(jnp.float32)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    keys, values, z, peaks, totals = call(
        decode_kernel,
        keys,
        values,
        jnp.int32(0) if layer is None else layer,
        cells,
        None,  # no starts
        k.astype(keys.dtype),
        v.astype(values.dtype),
        q.astype(keys.dtype),
        heads(sinks),
        heads(alibi),
        S,
        outputs=[
            shape(*keys.shape, dtype=keys.dtype),
            shape(*values.shape, dtype=values.dtype),
            shape(B, N, splits, HV, dtype=q.dtype if splits == 1 else jnp.float32),
            shape(B, N, splits),
            shape(B, N, splits),
        ],
        programs=B * K * -(-(N // K) // group) * splits,
        launch=tile,
        architecture=on,
        aliases={0: 0, 1: 1},
        L=1 if layer is None else keys.shape[-4],
        N=N,
        K=K,
        GROUP=group,
        SPLIT=split,
        RING=is_ring(options, S),
        HAS_STARTS=False,
        HAS_SINKS=sinks is not None,
        **score_constants(options, on, H, HV, keys.dtype, alibi),
    )
    if splits > 1:
        tile = launch("combine", on, HV, jnp.float32)
        (z,) = call(
            combine_kernel,
            z,
            peaks,
            totals,
            outputs=[shape(B, N, HV, dtype=q.dtype)],
            programs=B * N,
            launch=tile,
            architecture=on,
            H=HV,
            WIDTH=width(HV),
            SPLITS=splits,
            PADDED_SPLITS=power_of_two(splits),
        )
    return keys, values, z.reshape(B, 1, N, HV)
