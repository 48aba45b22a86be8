"""What a model computes for a token, and what a device can compute."""

import math
from functools import partial

import jax

from transformer.config import Config
from transformer.program.experts import Experts
from transformer.program.init import init_params


def flops_per_token(config: Config, length: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `length`.

    6 for each parameter that multiplies the token, and in each layer of attention 12 N H for each
    key (PaLM, arXiv:2204.02311, appendix B). As there, a query counts all `length` keys, or its
    window, causality aside; what remat computes again does not count, and of the experts those
    chosen count. A layer of the delta rule counts four products with its state.
    """
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    multiplying = count(params) - count(params.positions)
    if not config.tie_embeddings:
        multiplying -= count(params.embedding)
    if config.num_experts:
        networks = [layer.feed_forward for layer in params.layers]
        experts = [(x.up, x.down, x.gate) for x in networks if isinstance(x, Experts)]
        multiplying -= count(experts) * (1 - config.experts_per_token / config.num_experts)
    reading = sum(_reading_flops(config, kind, window, length) for kind, window in config.layers)
    return 6.0 * multiplying + reading


def _reading_flops(config, kind, window, length):
    """FLOPs of forward and backward in one layer's instruction, for one token.

    A kind of layer that is not known here counts none.
    """
    H, N = config.shape.H, config.num_heads
    keys = length if window is None else min(window, length)
    if kind == "attention":
        return 12 * N * H * keys
    if kind == "latent":
        key_size, value_size = H + config.latent.rotary_size, config.latent.value_size or H
        return 6 * N * (key_size + value_size) * keys
    if kind == "delta":
        sizes = config.delta_sizes
        return 3 * 4 * 2 * sizes.num_value_heads * sizes.key_size * sizes.value_size
    return 0


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
