"""The position-wise network: dense, or a mixture of experts."""

import jax
from flax import struct

from transformer.program.activation import activate
from transformer.program.experts import Experts, mix_experts
from transformer.program.linear import Linear, linear


@struct.dataclass
class FeedForward:
    """up [E, F]; down [F, E]; gate [E, F] in the gated forms, else None."""

    up: Linear
    down: Linear
    gate: Linear | None = None


def feed_forward(spec, params: FeedForward | Experts, x: jax.Array) -> jax.Array:
    """x [E] -> [E]."""
    if isinstance(params, Experts):
        return mix_experts(spec, params, x)
    hidden = linear(spec, params.up, x)
    gate = None if params.gate is None else linear(spec, params.gate, x)
    return linear(spec, params.down, activate(spec, hidden, gate))
