"""The backend `splash`: JAX's own Pallas kernel for TPUs, told about positions as data.

The kernel masks by a function of a number per query and the index of a key, and skips tiles by
tables in scalar memory. Both are made here of each query's interval `first..last` of visible cells,
so causality, windows, packed documents and padding need no mask [T, S].
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    BlockSizes,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.partition import foldable, varying
from kernels.tracing.target import platform

LANES = 128  # tiles are multiples of a vector register's lanes
TILE = 512
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
PACKED_BITS = 15  # of each end of an interval, where both are data: two of them fit an int32


@dataclass(frozen=True)
class _Visible:
    """Whether a query sees a cell; hashable, since the kernel takes it as a static argument."""

    num_cells: int
    window: int | None
    packed: bool

    def __call__(self, query, cell):
        last = query & ((1 << PACKED_BITS) - 1) if self.packed else query
        visible = (cell <= last) & (cell < self.num_cells)
        if self.packed:
            return visible & (cell >= query >> PACKED_BITS)
        return visible if self.window is None else visible & (cell > last - self.window)


def attend(
    q,
    keys,
    values,
    where: Where,
    shared: Shared,
    *,
    options: Options,
    interpret: bool = False,
):
    """`kernels.backends.xla.attend` without the log-sum-exp: None in its place.

    Args:
      interpret: whether to run the kernel's program on the platform at hand, as tests do.

    Raises:
      NotImplementedError: the platform is not a TPU, or the kernel lacks what is asked for:
        positions of keys, ALiBi, keys and values of different sizes, starts in a block of more than
        32768 cells, `jax_enable_x64`, or a `shard_map` that checks what varies.
    """
    B, T, N, _ = q.shape
    _check(q, keys, values, where, shared, interpret)
    rows = where.q_positions, where.q_starts, shared.sinks
    operands = (q, keys, values, *rows)
    if jax.device_count() == 1:
        return _run(options, interpret, *operands)[0], None
    spread = lambda x, *shape: None if x is None else jnp.broadcast_to(x, shape)
    rows = map(spread, rows, (B, B, B), (T, T, N))
    return _run_on_devices(options, interpret, q, keys, values, *rows)[0], None


AXES = ("btnh", "bksh", "bksh", "bt", "bt", "bn")


# A call that is split over devices has no gradient, and the kernel keeps what it needs for its own
# to itself; so here the backward pass runs the forward kernel once more.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_on_devices(options, interpret, *operands):
    return foldable(partial(_run, options, interpret), AXES, ("btnh",))(*operands)


def _run_fwd(options, interpret, *operands):
    return _run_on_devices(options, interpret, *operands), operands


def _run_bwd(options, interpret, operands, cotangents):
    sinks = operands[-1]

    def pull(q, keys, values, q_positions, q_starts, sinks, dz):
        run = lambda q, keys, values, sinks: _run(
            options, interpret, q, keys, values, q_positions, q_starts, sinks
        )
        gradients = jax.vjp(run, q, keys, values, sinks)[1]((dz,))
        return gradients if sinks is not None else gradients[:3]

    axes = ("btnh", "bksh", "bksh", "bn")[: 3 if sinks is None else 4]
    dq, dkeys, dvalues, *dsinks = foldable(pull, (*AXES, "btnh"), axes)(*operands, *cotangents)
    return dq, dkeys, dvalues, None, None, dsinks[0] if dsinks else None


_run_on_devices.defvjp(_run_fwd, _run_bwd)


def _run(options, interpret, q, keys, values, q_positions, q_starts, sinks):
    """(z,), on one device; sinks [N] or [B, N]."""
    T, S = q.shape[1], keys.shape[2]
    dtype = keys.dtype if keys.dtype.itemsize < q.dtype.itemsize else q.dtype
    q_tile, kv_tile = (min(TILE, -(-n // LANES) * LANES) for n in (T, S))

    # The kernel cannot read nothing: such a query reads the first cell, and its result is dropped.
    first, last, empty = Where(q_positions, q_starts=q_starts).cells(S, options.window)
    query = jnp.where(empty, 0, q_positions)
    if q_starts is not None:
        query = first << PACKED_BITS | last
    visible = _Visible(S, options.window, q_starts is not None)

    first, last, query = (_pad(x, 1, q_tile, "edge") for x in (first, last, query))
    tables = _tables(first, last, q_tile, -(-S // kv_tile), kv_tile)
    kernel = partial(_kernel, tables, visible, q_tile, kv_tile, options.soft_cap, interpret)
    shared = query.shape[0] == 1
    per_row = sinks is not None and sinks.ndim == 2
    z = jax.vmap(kernel, in_axes=(None if shared else 0, 0, 0, 0, 0 if per_row else None))(
        query[0] if shared else query,
        _pad((q * options.scale).astype(dtype).swapaxes(1, 2), 2, q_tile),
        _pad(keys.astype(dtype), 2, kv_tile),
        _pad(values.astype(dtype), 2, kv_tile),
        sinks,
    )
    z = z[:, :, :T].swapaxes(1, 2)
    return (jnp.where(empty[:, :, None, None], 0, z).astype(q.dtype),)


def _check(q, keys, values, where, shared, interpret):
    num_cells = keys.shape[2]
    if platform() != "tpu" and not interpret:
        raise NotImplementedError(
            f"it runs on TPUs, and this is a {platform()}; to lower for a TPU that is not there, "
            "trace under kernels.tracing.target.target('tpu')."
        )
    if jax.config.jax_enable_x64:
        raise NotImplementedError("it has no float64, and does not run under jax_enable_x64.")
    if varying(q):
        raise NotImplementedError("inside shard_map it needs check_vma=False.")
    if keys.shape != values.shape:
        raise NotImplementedError("the heads of keys and values must have one size.")
    if where.kv_positions is not None:
        raise NotImplementedError("it has no positions of keys.")
    if shared.alibi is not None:
        raise NotImplementedError("it has no ALiBi.")
    if where.q_starts is not None and num_cells > 1 << PACKED_BITS:
        raise NotImplementedError(
            f"with packed documents it takes blocks of up to {1 << PACKED_BITS} cells; "
            f"got {num_cells}."
        )


def _tables(first, last, q_tile, num_kv_tiles, kv_tile):
    """Which tiles of keys each tile of queries sees, [1, T tiles, S tiles], and what to fetch.

    One table serves all rows, so that `vmap` over rows leaves it in scalar memory.
    """
    low = first.reshape(first.shape[0], -1, q_tile).min((0, 2)) // kv_tile
    high = last.reshape(last.shape[0], -1, q_tile).max((0, 2)) // kv_tile
    tiles = jnp.arange(num_kv_tiles)
    seen = (tiles >= low[:, None]) & (tiles <= high[:, None])
    # Where nothing is read, the tile that is read next or was read last: it is not fetched again.
    next_keys = jnp.clip(tiles, low[:, None], high[:, None])
    rows = jnp.arange(len(low))[:, None]
    next_queries = jnp.clip(rows, jnp.argmax(seen, 0), len(low) - 1 - jnp.argmax(seen[::-1], 0))
    return tuple(x.astype(jnp.int32)[None] for x in (seen, next_keys, next_queries))


def _kernel(tables, visible, q_tile, kv_tile, soft_cap, interpret, query, q, keys, values, sinks):
    """One sequence: q [N, T, H], keys and values [K, S, H]."""
    seen, next_keys, next_queries = tables
    info = lambda following: MaskInfo(following, None, seen, None, query)
    kernel = SplashAttentionKernel(
        info(next_keys),
        info(next_keys),
        info(next_queries),
        is_mqa=False,
        block_sizes=BlockSizes(
            block_q=q_tile,
            block_kv=kv_tile,
            block_q_dkv=q_tile,
            block_kv_dkv=kv_tile,
            block_q_dq=q_tile,
            block_kv_dq=kv_tile,
        ),
        save_residuals=False,
        mask_value=MASKED,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=None,
        mask_function=visible,
        interpret=interpret,
    )
    return kernel(q, keys, values, sinks=sinks)


def _pad(x, axis, multiple, mode="constant"):
    short = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, short if n == axis else 0) for n in range(x.ndim)], mode)
