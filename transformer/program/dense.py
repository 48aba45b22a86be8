"""The position-wise network that all tokens run through."""

import jax
from flax import struct

from transformer.program.activation import activate
from transformer.program.linear import Linear, linear, linears


@struct.dataclass
class FeedForward:
    """up [E, F]; down [F, E]; gate [E, F] in the gated forms, else None."""

    up: Linear
    down: Linear
    gate: Linear | None = None


def dense(spec, params: FeedForward, x: jax.Array) -> jax.Array:
    """x [E] -> [E]."""
    parts = [part for part in (params.up, params.gate) if part is not None]
    return linear(spec, params.down, activate(spec, *linears(spec, parts, x)))
