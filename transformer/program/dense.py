"""The position-wise network that all tokens run through."""

import jax
from flax import struct

from transformer.program.activation import activate
from transformer.program.linear import Linear, linear


@struct.dataclass
class FeedForward:
    """up [E, F]; down [F, E]; gate [E, F] in the gated forms, else None."""

    up: Linear
    down: Linear
    gate: Linear | None = None


def dense(spec, params: FeedForward, x: jax.Array) -> jax.Array:
    """x [E] -> [E]."""
    hidden = linear(spec, params.up, x)
    gate = None if params.gate is None else linear(spec, params.gate, x)
    return linear(spec, params.down, activate(spec, hidden, gate))
