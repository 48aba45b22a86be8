"""The position-wise network: dense, or a mixture of experts."""

import jax

from transformer.program.dense import FeedForward, dense
from transformer.program.experts import Experts, mix_experts


def feed_forward(spec, params: FeedForward | Experts, x: jax.Array) -> jax.Array:
    """x [E] -> [E]."""
    if isinstance(params, Experts):
        return mix_experts(spec, params, x)
    return dense(spec, params, x)
