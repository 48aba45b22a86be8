"""The backend `tokamax`: its Mosaic kernels for Hopper and Blackwell, told about positions as data.

The public function of tokamax takes masks as modes. The op below it takes the interval of keys that
each query sees, which is what positions, windows, packed documents and padding come to.
"""

import jax
import jax.numpy as jnp
from tokamax._src.ops.attention.base import DotProductAttention, Mask
from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

from kernels.backends.choice import refuse
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.target import architecture


def attend(
    q,
    keys,
    values,
    where: Where,
    shared: Shared,
    *,
    options: Options,
    op: DotProductAttention | None = None,
):
    """`kernels.backends.xla.attend` without the log-sum-exp: None in its place.

    Args:
      op: what runs it, a Mosaic kernel unless tests say otherwise.

    Raises:
      NotImplementedError: the kernel lacks what is asked for, or the platform is not a GPU of
        compute capability 9.0 or 10.0.
    """
    on = architecture()
    refuse(
        {
            f"it runs on compute capability 9.0 and 10.0; got {on / 10}": on not in (90, 100),
            "it takes float16 and bfloat16 only": jnp.dtype(q.dtype).itemsize != 2,
            "queries and keys must have one dtype": q.dtype != keys.dtype,
            "the heads of keys and values must have one size": keys.shape != values.shape,
            "it has no positions of keys": where.kv_positions is not None,
            "it has no sinks": shared.sinks is not None,
            "it has no ALiBi": shared.alibi is not None,
            "it does not split rows over devices": jax.device_count() > 1,
        }
    )
    # As of splash: a query that sees nothing reads cell 0, and its result is dropped.
    first, last, empty = where.cells(keys.shape[2], options.window)
    op = op or PallasMosaicGpuFlashAttention()
    z = op(
        q,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=Mask(k_start=first[:, None], k_end=last[:, None] + 1),
        logits_scale=options.scale,
        logits_soft_cap=options.soft_cap,
    )
    return jnp.where(empty[:, :, None, None], 0, z), None
