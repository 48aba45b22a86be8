"""The layer: a function of one token.

Nothing here knows whether the token runs alone, with others of its sequence, or with other
sequences: `jax.vmap` and `write_read` see to that. Every variant is a choice of `Config`, inside
one of these functions.
"""

import jax
from flax import struct

from transformer.memory.cache import Turn
from transformer.program import attention, delta, latent
from transformer.program.attention import Attention
from transformer.program.delta import GatedDelta
from transformer.program.dense import FeedForward
from transformer.program.experts import Experts
from transformer.program.feed_forward import feed_forward
from transformer.program.latent import LatentAttention
from transformer.program.linear import Norm, norm
from transformer.program.remat import segment
from transformer.program.spec import LayerSpec

# How tokens reach each other in each kind of layer. Every module has `mix`, `output`, `blocks` and
# `init`.
KINDS = {"attention": attention, "latent": latent, "delta": delta}


@struct.dataclass
class Layer:
    """The parameters of one layer; a norm that `norm_placement` does not use is None."""

    mixer: Attention | LatentAttention | GatedDelta
    feed_forward: FeedForward | Experts
    mixer_norm: Norm | None = None
    mixer_post_norm: Norm | None = None
    feed_forward_norm: Norm | None = None
    feed_forward_post_norm: Norm | None = None


def layer(spec: LayerSpec, params: Layer, turn: Turn, x: jax.Array):
    """One layer for one token: x [E] -> (turn, x [E])."""
    turn, z = KINDS[spec.kind].mix(spec, params, turn, x)
    return turn, combine(spec, params, x, z)


@segment
def combine(spec, params, x, z):
    """What the token makes of what it read, z: x [E] -> x [E]."""
    y = KINDS[spec.kind].output(spec, params.mixer, z)
    if spec.config.parallel_residual:
        normed = norm(spec, params.feed_forward_norm, x)
        return add(spec, add(spec, x, y), feed_forward(spec, params.feed_forward, normed))
    x = residual(spec, params.mixer_post_norm, x, y)
    y = feed_forward(spec, params.feed_forward, norm(spec, params.feed_forward_norm, x))
    return residual(spec, params.feed_forward_post_norm, x, y)


def residual(spec, params, x, y):
    """Adds a sublayer's output y to its input x, normalised where the config says."""
    if spec.config.norm_placement == "post":
        return norm(spec, params, add(spec, x, y))
    return add(spec, x, norm(spec, params, y))


def add(spec, x, y):
    """x + y, rounded once."""
    return spec.numerics.narrowed(x + y)
