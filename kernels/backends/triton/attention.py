"""The differentiable op: attention by position, forward and backward in Triton."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.backends.triton import splitting
from kernels.backends.triton.adapter import call
from kernels.backends.triton.backward_kernels import dkdv_kernel, dq_kernel
from kernels.backends.triton.forward_kernel import forward_kernel
from kernels.backends.triton.launches import MULTIPLE, launch, score_constants
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.partition import foldable, vary_like
from kernels.tracing.target import architecture


def attend(
    q,
    keys,
    values,
    where: Where,
    shared: Shared,
    *,
    options: Options,
    on: int | None = None,
):
    """Attention by position: a query at i reads the keys at start..i.

    Args:
      q: [B, T, N, H], float32, bfloat16 or float16.
      keys, values: [B, K, S, H] and [B, K, S, Hv], both sizes up to 256; N is a multiple of K.
        Products are in the narrower of the dtypes of q and keys.
      where: which keys each query reads.
      shared: the sinks and the slopes of ALiBi.
      options: scale, window, soft cap, and whether bits must be equal.
      on: the architecture to compile for, ten times the compute capability; if None, that of
        `kernels.tracing.target.architecture`.

    Returns:
      z [B, T, N, Hv] in q's dtype, zero where a query reads nothing; and the log-sum-exp [B, T, N]
      of the scores in float32, -inf where a query reads nothing. Both have gradients, for q, keys,
      values and sinks; the same operands give the same bits every time.

    Raises:
      NotImplementedError: the head size, dtype or architecture is not in the table of launches.
    """
    B, _, N, _ = q.shape
    if options.exact:
        check_exact(q, keys, values, where)
    dtype = q.dtype if q.dtype.itemsize < keys.dtype.itemsize else keys.dtype

    def rows(x):
        return None if x is None else jnp.broadcast_to(x.astype(jnp.int32), (B, x.shape[1]))

    def heads(x):
        return None if x is None else jnp.broadcast_to(x.astype(jnp.float32), (B, N))

    moving = (*(_whole(x, dtype) for x in (q, keys, values)), heads(shared.sinks))
    places = map(rows, (where.q_positions, where.kv_positions, where.q_starts))
    operands = moving, (*places, heads(shared.alibi))
    operands = vary_like(operands, operands)
    z, lse = _attend(options, architecture() if on is None else on, *operands)
    return z[..., : values.shape[3]].astype(q.dtype), lse.swapaxes(1, 2)


def check_exact(q, keys, values, where: Where):
    """Raises NotImplementedError where not every way to read a block would have the same bits."""
    if where.kv_positions is not None:
        raise NotImplementedError("exact numerics have no positions of keys.")
    if q.dtype != keys.dtype or (keys.shape[-1] | values.shape[-1]) % MULTIPLE:
        raise NotImplementedError(
            f"exact numerics want queries of the blocks' dtype, and heads of a multiple of "
            f"{MULTIPLE} numbers; got {q.dtype} and {keys.dtype}, heads of {keys.shape[-1]} and "
            f"{values.shape[-1]}."
        )


def _whole(x, dtype):
    """Heads in another dtype, and filled up with zeros to a size that the kernels load well."""
    return jnp.pad(x.astype(dtype), ((0, 0),) * 3 + ((0, -x.shape[3] % MULTIPLE),))


# The axes of the operands, see `kernels.tracing.partition`: q, keys, values and sinks, which have
# gradients; then the positions of queries and keys, starts and slopes, which have none.
AXES = ("btnh", "bksh", "bksh", "bn", "bt", "bs", "bt", "bn")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, on, moving, fixed):
    return foldable(partial(_forward, options, on), AXES, ("btnh", "bnt"))(*moving, *fixed)


def _attend_fwd(options, on, moving, fixed):
    z, lse = _attend(options, on, moving, fixed)
    return (z, lse), ((*moving, *fixed), z, lse)


def _constants(options, on, q, keys, values, kv_positions, q_starts, alibi):
    return score_constants(options, on, q.shape[3], values.shape[3], q.dtype, alibi) | {
        "N": q.shape[2],
        "K": keys.shape[1],
        "HAS_KV_POSITIONS": kv_positions is not None,
        "HAS_STARTS": q_starts is not None,
    }


def _forward(options, on, q, keys, values, sinks, q_positions, kv_positions, q_starts, alibi):
    """Returns z [B, T, N, HV] and the log-sum-exp [B, N, T]."""
    B, T, N, H = q.shape
    if options.exact or (T <= splitting.FEW and kv_positions is None):
        operands = q, keys, values, None, sinks, q_positions, q_starts, alibi
        return splitting.read(options, on, *operands)
    HV = values.shape[3]
    tile = launch("forward", on, max(H, HV), q.dtype)
    z, lse = call(
        forward_kernel,
        q,
        keys,
        values,
        q_positions,
        kv_positions,
        q_starts,
        sinks,
        alibi,
        T,
        keys.shape[2],
        outputs=[
            jax.ShapeDtypeStruct((B, T, N, HV), q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        programs=B * N * -(-T // tile.block_m),
        launch=tile,
        architecture=on,
        HAS_SINKS=sinks is not None,
        **_constants(options, on, q, keys, values, kv_positions, q_starts, alibi),
    )
    return z, lse


def _backward(
    options,
    on,
    q,
    keys,
    values,
    sinks,
    q_positions,
    kv_positions,
    q_starts,
    alibi,
    z,
    lse,
    dz,
    dlse,
):
    """Gradients of q, keys, values and, where there are any, sinks [B, N]."""
    B, T, N, H = q.shape
    K, S, HV = values.shape[1:]
    # A sum of products, not an einsum: a GPU would make that a matrix product in lower precision.
    delta = (z.astype(jnp.float32) * dz.astype(jnp.float32)).sum(3).swapaxes(1, 2) - dlse
    arrays = (q, keys, values, q_positions, kv_positions, q_starts, alibi, dz, lse, delta)
    constants = _constants(options, on, q, keys, values, kv_positions, q_starts, alibi)
    tile = launch("dq", on, max(H, HV), q.dtype)
    (dq,) = call(
        dq_kernel,
        *arrays,
        T,
        S,
        outputs=[_like(q)],
        programs=B * N * -(-T // tile.block_m),
        launch=tile,
        architecture=on,
        **constants,
    )
    tile = launch("dkdv", on, max(H, HV), q.dtype)
    dkeys, dvalues = call(
        dkdv_kernel,
        *arrays,
        T,
        S,
        outputs=[_like(keys), _like(values)],
        programs=B * K * -(-S // tile.block_n),
        launch=tile,
        architecture=on,
        **constants,
    )
    if sinks is None:
        return dq, dkeys, dvalues
    # Where a query reads nothing, its results are constants and no weight goes to the sinks.
    weights = jnp.exp(sinks[:, :, None] - jnp.where(jnp.isneginf(lse), jnp.inf, lse))
    return dq, dkeys, dvalues, -(weights * delta).sum(2)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _attend_bwd(options, on, residuals, cotangents):
    operands, z, lse = residuals
    backward = partial(_backward, options, on)
    axes = (*AXES, "btnh", "bnt", "btnh", "bnt")
    results = AXES[: 3 if operands[3] is None else 4]
    dq, dkeys, dvalues, *dsinks = foldable(backward, axes, results)(*operands, z, lse, *cotangents)
    return (dq, dkeys, dvalues, dsinks[0] if dsinks else None), None


_attend.defvjp(_attend_fwd, _attend_bwd)
