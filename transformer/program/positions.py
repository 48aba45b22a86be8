"""Positions: rotary embeddings with their scalings, and ALiBi slopes."""

import functools
import math

import jax.numpy as jnp
import numpy as np


def rotate(spec, x, i, size=None):
    """Turns the pairs (x_j, x_{j + size/2}) of each head by the angle i * frequency_j.

    RoPE (arXiv:2104.09864), the pairing of GPT-NeoX and Llama. x: [heads, H]; i: scalar; size: how
    many numbers of each head turn, None: as the config says.
    """
    size = spec.config.rotary_size if size is None else size
    frequencies, magnitude = rotary_frequencies(spec.config, size)
    rounded = spec.numerics.rounded
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = rounded(i.astype(jnp.float32) * frequencies)
    turn = lambda f: spec.numerics.once(magnitude * f(angle).astype(wide))
    cos, sin = turn(spec.numerics.cos), turn(spec.numerics.sin)
    half = size // 2
    a, b = (x[:, n * half : (n + 1) * half].astype(wide) for n in (0, 1))
    turned = [rounded(a * cos) - rounded(b * sin), rounded(b * cos) + rounded(a * sin)]
    turned = rounded(jnp.concatenate(turned, axis=-1).astype(x.dtype))
    return jnp.concatenate([turned, x[:, 2 * half :]], axis=-1)


@functools.lru_cache
def rotary_frequencies(config, size):
    """Angles per position, float32 [size / 2], and the factor on cos and sin.

    A layer with a window uses `rotary_window_base` and its scaling where the base is given.
    """
    scaling, base = config.rotary_scaling, config.rotary_base
    if config.window is not None and config.rotary_window_base is not None:
        scaling, base = config.rotary_window_scaling, config.rotary_window_base
    if scaling is not None and scaling.kind == "ntk":
        base *= scaling.factor ** (size / (size - 2))
    frequencies = base ** -(np.arange(0, size, 2) / size)
    magnitude = 1.0
    if scaling is None or scaling.kind == "ntk":
        pass
    elif scaling.kind == "linear":
        frequencies /= scaling.factor
    elif scaling.kind == "longrope":
        frequencies /= np.asarray(scaling.divisors)
        magnitude = scaling.attention_factor or 1.0
    elif scaling.kind == "llama3":
        rotations = scaling.original_max_length * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((rotations - low) / (high - low), 0, 1)
        frequencies *= kept + (1 - kept) / scaling.factor
    elif scaling.kind == "yarn":
        dimension = lambda rotations: (
            size
            * math.log(scaling.original_max_length / (rotations * 2 * math.pi))
            / (2 * math.log(base))
        )
        low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (np.arange(size // 2) - low) / max(high - low, 0.001)
        kept = 1 - np.clip(ramp, 0, 1)
        frequencies *= kept + (1 - kept) / scaling.factor
        magnitude = scaling.attention_factor
        if magnitude is None:
            magnitude = 0.1 * math.log(scaling.factor) + 1
    return np.asarray(frequencies, np.float32), np.float32(magnitude)


@functools.lru_cache
def alibi_slopes(num_heads: int):
    """The N slopes of ALiBi (arXiv:2108.12409, section 3).

    A geometric sequence where N is a power of two; otherwise that of the power below, filled up
    with every other slope of the power above.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (n + 1) / power) for n in range(power)]
    slopes += [2 ** (-4 * (2 * n + 1) / power) for n in range(num_heads - power)]
    return tuple(slopes)
