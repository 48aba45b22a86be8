"""What every part of a layer is made of: matrices with their biases, and norms."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Linear:
    """weight: [in, out]; bias: [out], or None."""

    weight: jax.Array
    bias: jax.Array | None = None


@struct.dataclass
class Norm:
    """scale: [E] or [H]; bias: the same, or None."""

    scale: jax.Array
    bias: jax.Array | None = None


def linear(params: Linear, x):
    """x [in] -> [out], computed in x's dtype."""
    y = x @ params.weight.astype(x.dtype)
    return y if params.bias is None else y + params.bias.astype(x.dtype)


def norm(config, params: Norm | None, x):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last axis, in float32; None: identity."""
    if params is None:
        return x
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if config.norm == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = rms_norm(y, config.norm_epsilon) * params.scale
    return (y if params.bias is None else y + params.bias).astype(x.dtype)


def rms_norm(x, epsilon):
    """x over the root of its mean square, in the last axis; in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
