"""The layer, and what it is made of: functions of one token.

Nothing here knows whether the token runs alone, with others of its sequence, or with other
sequences: `jax.vmap` and `write_read` see to that. Every variant is a choice of `Config`, inside
one of these functions; `config.window` is that of the layer at hand.
"""

import jax
import jax.numpy as jnp
from flax import struct

from transformer.config import Config
from transformer.memory.cache import Cache
from transformer.program.experts import Experts, mix_experts
from transformer.program.feed_forward import activate
from transformer.program.positions import alibi_slopes, rotate


@struct.dataclass
class Norm:
    """scale: [E] or [H]; bias: the same, or None."""

    scale: jax.Array
    bias: jax.Array | None = None


@struct.dataclass
class Linear:
    """weight: [in, out]; bias: [out], or None."""

    weight: jax.Array
    bias: jax.Array | None = None


@struct.dataclass
class Attention:
    """query [E, N*H]; key, value [E, K*H]; output [N*H, E]; q_norm, k_norm [H]; sinks [N]."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: jax.Array | None = None


@struct.dataclass
class FeedForward:
    """up [E, F]; down [F, E]; gate [E, F] in the gated forms."""

    up: Linear
    down: Linear
    gate: Linear | None = None


@struct.dataclass
class Layer:
    """The parameters of one layer; a norm that `norm_placement` does not use is None."""

    attention: Attention
    feed_forward: FeedForward | Experts
    attention_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    feed_forward_norm: Norm | None = None
    feed_forward_post_norm: Norm | None = None


def layer(config: Config, params: Layer, cache: Cache, x: jax.Array, i: jax.Array):
    """One layer for one token: x [E] at position i -> (cache, x [E])."""
    q, k, v = project(config, params, x, i)
    cache, z = cache.write_read(i, k, v, q, **reading(config, params.attention))
    return cache, combine(config, params, x, z)


def _segment(function):
    """Marks what runs between two instructions: `config.remat` may recompute it for the gradient.

    The instructions themselves are never recomputed: that would keep every state of the cache.
    """
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    recomputed = {
        "none": function,
        "segments": jax.checkpoint(function, static_argnums=0),
        "dots": jax.checkpoint(function, static_argnums=0, policy=dots),
    }
    return lambda config, *operands: recomputed[config.remat](config, *operands)


@_segment
def project(config, params, x, i):
    """What the token writes and asks: x [E] -> q [N, H], k [K, H], v [K, H]."""
    attention = params.attention
    x = norm(config, params.attention_norm, x)
    heads = lambda y: y.reshape(-1, config.head_size)
    q, k, v = (heads(linear(p, x)) for p in (attention.query, attention.key, attention.value))
    q, k = norm(config, attention.q_norm, q), norm(config, attention.k_norm, k)
    if config.positions == "rotary":
        q, k = rotate(config, q, i), rotate(config, k, i)
    return q, k, v


def reading(config, params):
    """How the token reads: the options of `write_read`."""
    alibi = alibi_slopes(config.num_heads) if config.positions == "alibi" else None
    return {
        "window": config.window,
        "scale": config.attention_scale,
        "soft_cap": config.attention_soft_cap,
        "sinks": params.sinks,
        "alibi": alibi,
    }


@_segment
def combine(config, params, x, z):
    """What the token makes of what it read: x [E], z [N, H] -> x [E]."""
    y = linear(params.attention.output, z.reshape(-1))
    if config.parallel_residual:
        normed = norm(config, params.feed_forward_norm, x)
        return x + y + feed_forward(config, params.feed_forward, normed)
    x = residual(config, params.attention_post_norm, x, y)
    y = feed_forward(config, params.feed_forward, norm(config, params.feed_forward_norm, x))
    return residual(config, params.feed_forward_post_norm, x, y)


def feed_forward(config, params, x):
    """The position-wise network: x [E] -> [E]."""
    if isinstance(params, Experts):
        return mix_experts(config, params, x)
    hidden = linear(params.up, x)
    gate = None if params.gate is None else linear(params.gate, x)
    return linear(params.down, activate(config, hidden, gate))


def residual(config, params, x, y):
    """Adds a sublayer's output y to its input x, normalised where the config says."""
    if config.norm_placement == "post":
        return norm(config, params, x + y)
    return x + norm(config, params, y)


def norm(config, params, x):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last axis, in float32; None: identity."""
    if params is None:
        return x
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if config.norm == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + config.norm_epsilon)
    y = y * params.scale
    return (y if params.bias is None else y + params.bias).astype(x.dtype)


def linear(params, x):
    """x [in] -> [out], computed in x's dtype."""
    y = x @ params.weight.astype(x.dtype)
    return y if params.bias is None else y + params.bias.astype(x.dtype)
