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


# In what follows `spec` is anything that has a `config` and `numerics`: a layer's, or a program.


def linear(spec, params: Linear, x):
    """x [in] -> [out], computed in x's dtype."""
    return linears(spec, [params], x)[0]


def linears(spec, parts: list[Linear], x):
    """x [in] through each of several -> [[out], ...]."""
    ys = spec.numerics.dots(x, [part.weight for part in parts])
    return [_biased(spec, part.bias, y) for part, y in zip(parts, ys, strict=True)]


def _biased(spec, bias, y):
    if bias is None:
        return y
    narrowed = spec.numerics.narrowed
    return narrowed(y + narrowed(bias.astype(y.dtype)))


def norm(spec, params: Norm | None, x, epsilon: float | None = None):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last axis, in float32; None: identity.

    epsilon: the number under the root; None: that of the config.
    """
    if params is None:
        return x
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if spec.config.norm == "layer":
        y = y - spec.numerics.mean(y)
    y = spec.numerics.rounded(rms_norm(spec, y, epsilon) * params.scale)
    return spec.numerics.narrowed((y if params.bias is None else y + params.bias).astype(x.dtype))


def rms_norm(spec, x, epsilon: float | None = None):
    """x over the root of its mean square, in the last axis; in float32 or wider.

    epsilon: as in `norm`.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = spec.numerics.mean(jnp.square(x))
    epsilon = spec.config.norm_epsilon if epsilon is None else epsilon
    return x * spec.numerics.rsqrt(mean_square + epsilon)
