"""The oracle: attention as the formula says it, dense, differentiated by JAX itself.

Every other backend is tested against this one, in float64.
"""

import jax
import jax.numpy as jnp

from kernels.operands import Shared, Where
from kernels.options import Options


def attend(q, keys, values, where: Where, shared: Shared, *, options: Options):
    """`xla.attend` in its plainest form; holds all scores [B, N, T, S] in memory."""
    B, T, N = q.shape[:3]
    K, S = keys.shape[1:3]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    keys, values = (x.astype(dtype).repeat(N // K, axis=1) for x in (keys, values))
    scores = jnp.einsum("btnh,bnsh->bnts", q.astype(dtype), keys, precision="highest")
    scores *= options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    i, positions = where.q_positions, where.kv_positions
    positions = jnp.arange(S, dtype=i.dtype)[None] if positions is None else positions
    distance = i[:, :, None] - positions[:, None, :]
    starts = jnp.zeros_like(i) if where.q_starts is None else jnp.maximum(where.q_starts, 0)
    visible = (distance >= 0) & (positions[:, None, :] >= starts[:, :, None])
    if options.window is not None:
        visible &= distance < options.window
    if shared.alibi is not None:
        scores -= shared.alibi[:, None, None].astype(dtype) * distance[:, None]
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    # Where nothing is read, -inf takes part in no sum: its gradient would be nan.
    nothing = ~visible.any(-1)[:, None, :, None]
    if shared.sinks is not None:
        sink = jnp.broadcast_to(shared.sinks.astype(dtype)[:, None, None], (B, N, T, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    lse = jax.nn.logsumexp(jnp.where(nothing, 0, scores), axis=-1, keepdims=True)
    weights = jnp.where(nothing, 0, jnp.exp(scores - lse))[..., :S]
    lse = jnp.where(nothing, -jnp.inf, lse)[..., 0]
    z = jnp.einsum("bnts,bnsh->btnh", weights, values, precision="highest")
    return z.astype(q.dtype), jnp.moveaxis(lse, 1, 2)
