"""What a model computes for a token, and what a device can compute."""

import math
from functools import partial

import jax

from transformer.config import Config
from transformer.program.init import init_params


def flops_per_token(config: Config, length: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `length`.

    6 per parameter that multiplies the token, and 12 N H per layer and key (PaLM,
    arXiv:2204.02311, appendix B). As there, a query counts all `length` keys, or its window,
    causality aside; what remat computes again does not count. Of the experts those chosen count.
    """
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    multiplying = count(params) - count(params.positions)
    if not config.tie_embeddings:
        multiplying -= count(params.embedding)
    if config.num_experts:
        experts = [layer.feed_forward.replace(router=None) for layer in params.layers]
        multiplying -= count(experts) * (1 - config.experts_per_token / config.num_experts)
    keys = sum(length if window is None else min(window, length) for window in config.windows)
    return 6.0 * multiplying + 12.0 * config.num_heads * config.head_size * keys


# Dense bfloat16 FLOP/s with float32 sums, from the makers' data sheets, by jax's device_kind; the
# first name that it contains counts.
_PEAK_FLOPS = (
    ("B200", 2250e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("V100", 125e12),
    ("TPU v6 lite", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that a device's maker promises in dense bfloat16; None where it is not known."""
    return next((flops for name, flops in _PEAK_FLOPS if name in device.device_kind), None)
