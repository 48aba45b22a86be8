"""The instruction: write the cells of a chunk, then read the cells up to each of them.

A block is [K, S, H]. In front of that stand B, where there are several sequences, and then L, where
several layers share one array. A block of `window` cells is a ring, position p in cell p % window.

One token (T = 1) changes one cell in place and reads tiles of the block where it lies: no scatter,
no copy of a block. More tokens at once are one slice update and one attention.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.backends.choice import run
from kernels.cells import is_batched, is_ring, take, write, write_ring
from kernels.options import Options
from kernels.tracing.partition import vary_like


def write_read(
    keys, values, layer, cells, starts, k, v, q, sinks, alibi, *, options: Options, backend: str
):
    """Writes T new cells of each sequence into one layer's block, then reads for each of them.

    Args:
      keys, values: [K, S, H], [B, K, S, H], or [L, K, S, H], [B, L, K, S, H] with a layer. Without
        the axis, B is 1.
      layer: scalar int32, which of the L layers; None where there is no such axis.
      cells: [B or 1, T] int32: consecutive cell numbers; padding is -1 and comes last in a row. A
        padding token writes nothing, reads nothing.
      starts: [B or 1, T] int32, the first cell each token may read; None: 0.
      k, v: [B, T, K, H], written in the block's dtype.
      q: [B, T, N, H].
      sinks, alibi: [N] or None, as in `kernels.attention`.
      options, backend: static.

    `triton` has no batching rule for one token: sequences are the leading axis.

    Returns:
      keys, values with the new cells, and z [B, T, N, H].
    """
    operands = (keys, values, layer, cells, starts, k, v, q, sinks, alibi)
    return _write_read(options, backend, *vary_like(operands, operands))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _write_read(options, backend, keys, values, layer, cells, starts, k, v, q, sinks, alibi):
    def in_chunk():
        chunk = partial(_chunk, options, backend, cells, starts, alibi)
        keys_out, values_out, z = chunk(_layer(keys, layer), _layer(values, layer), k, v, q, sinks)
        return _replace(keys, layer, keys_out), _replace(values, layer, values_out), z

    def one_token(module):
        if hasattr(module, "decode"):
            return module.decode(
                keys, values, layer, cells, starts, k, v, q, sinks, alibi, options=options
            )
        if backend == "auto":
            raise NotImplementedError("it has no way of its own to run one token.")
        return in_chunk()

    return run(backend, one_token) if q.shape[1] == 1 else in_chunk()


# The gradient is taken for one layer at a time. Left to JAX, the gradient of `_layer(keys, layer)`
# would be an array of L blocks, zero but for one, for each of the L layers.
def _write_read_fwd(options, backend, keys, values, layer, cells, starts, k, v, q, sinks, alibi):
    chunk = partial(_chunk, options, backend, cells, starts, alibi)
    (keys_out, values_out, z), vjp = jax.vjp(
        chunk, _layer(keys, layer), _layer(values, layer), k, v, q, sinks
    )
    keys, values = _replace(keys, layer, keys_out), _replace(values, layer, values_out)
    return (keys, values, z), (vjp, layer)


def _write_read_bwd(options, backend, residuals, cotangents):
    vjp, layer = residuals
    dkeys, dvalues, dz = cotangents
    old = _layer(dkeys, layer), _layer(dvalues, layer)
    new_dkeys, new_dvalues, dk, dv, dq, dsinks = vjp((*old, dz))
    dkeys, dvalues = _replace(dkeys, layer, new_dkeys), _replace(dvalues, layer, new_dvalues)
    return dkeys, dvalues, None, None, None, dk, dv, dq, dsinks, None


_write_read.defvjp(_write_read_fwd, _write_read_bwd)


def _layer(blocks, layer):
    """One layer's block, [B, K, S, H]."""
    if not is_batched(blocks, layer):
        blocks = blocks[None]
    return blocks if layer is None else jax.lax.dynamic_index_in_dim(blocks, layer, 1, False)


def _replace(blocks, layer, block):
    """Puts one layer's block [B, K, S, H] back."""
    batched = is_batched(blocks, layer)
    if not batched:
        block = block[0]
    if layer is None:
        return block
    return jax.lax.dynamic_update_index_in_dim(blocks, block, layer, int(batched))


def _chunk(options, backend, cells, starts, alibi, keys, values, k, v, q, sinks):
    """The instruction on one layer's block [B, K, S, H], for any number of tokens."""

    def attend(keys, values, positions, starts):
        operands = (q, keys, values, positions, None, starts, sinks, alibi)
        return run(backend, lambda module: module.attend(*operands, options=options)[0])

    k = k.swapaxes(1, 2).astype(keys.dtype)
    v = v.swapaxes(1, 2).astype(values.dtype)
    if not is_ring(options, keys.shape[2]):
        keys, values = write(keys, cells, k), write(values, cells, v)
        return keys, values, attend(keys, values, cells, starts)
    # A chunk may overwrite cells that its own first tokens still see, so the read is from the ring
    # as it was, unrolled into the order of positions, followed by the chunk. Positions count from
    # the first unrolled cell on; those before position 0 are empty, so no token starts there.
    window = options.window
    base = cells[:, :1] - window
    turns = (base + jnp.arange(window)) % window
    unroll = lambda ring, new: jnp.concatenate([take(ring, turns), new], axis=2)
    first = jnp.zeros_like(cells) if starts is None else jnp.maximum(starts, 0)
    positions = jnp.where(cells < 0, -1, cells - base)
    z = attend(unroll(keys, k), unroll(values, v), positions, first - base)
    return write_ring(keys, cells, k), write_ring(values, cells, v), z
