"""The backend `cudnn`: NVIDIA's fused attention, as `jax.nn.dot_product_attention` offers it.

Its masks are modes, not data: it knows causality from the first position on, windows, and lengths.
So it does what is asked when the positions are known while tracing, or when there is one query.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.backends.choice import refuse
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.target import platform


def attend(q, keys, values, where: Where, shared: Shared, *, options: Options):
    """`kernels.backends.xla.attend` without the log-sum-exp: None in its place.

    Raises:
      NotImplementedError: cuDNN has no argument for what is asked, or the platform is not a CUDA
        GPU with cuDNN.
    """
    T, S = q.shape[1], keys.shape[2]
    refuse(
        {
            f"it runs on CUDA GPUs, and this is a {platform()}": platform() != "gpu",
            "it takes float16 and bfloat16 only": jnp.dtype(q.dtype).itemsize != 2,
            "queries and keys must have one dtype": q.dtype != keys.dtype,
            "the heads of keys and values must have one size": keys.shape != values.shape,
            "it has no positions of keys": where.kv_positions is not None,
            "it has no packed documents": where.q_starts is not None,
            "it has no sinks": shared.sinks is not None,
            "it has no ALiBi": shared.alibi is not None,
            "it has no soft cap": options.soft_cap is not None,
        }
    )
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    if T == 1:
        refuse({"it has no window for a single query": options.window is not None})
        last = jnp.broadcast_to(where.q_positions[:, 0], q.shape[:1])
        choices = {"key_value_seq_lengths": jnp.clip(last + 1, 1, S).astype(jnp.int32)}
    else:
        known = (
            isinstance(where.q_positions, np.ndarray) and (where.q_positions == np.arange(T)).all()
        )
        refuse(
            {
                "it needs positions 0..T-1 known while tracing: leave q_positions out": not known,
                f"it needs as many keys as queries, but got {S} for {T}": S < T,
            }
        )
        keys, values = keys[:, :T], values[:, :T]
        window = options.window
        choices = {"is_causal": True}
        choices["local_window_size"] = None if window is None else (window - 1, 0)
    # JAX refuses the gradient of odd lengths: one query more, whose result is dropped, and one key
    # that no other query sees.
    even = lambda x: jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)])
    try:
        z = jax.nn.dot_product_attention(
            *map(even, (q, keys, values)),
            scale=options.scale,
            implementation="cudnn",
            **choices,
        )
    except (RuntimeError, ValueError) as error:
        raise NotImplementedError(str(error)) from error
    if T == 1:
        z = jnp.where(last[:, None, None, None] < 0, 0, z)
    return z[:, :T], None
