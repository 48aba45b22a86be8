"""Layers of the kind "delta": the gated delta rule behind a short convolution, as in Qwen3-Next."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from transformer.memory.cache import Turn
from transformer.memory.cells import Window
from transformer.memory.delta import DeltaRule
from transformer.numerics.numerics import Numerics
from transformer.program.linear import Linear, Norm, linear, norm, rms_norm
from transformer.program.remat import segment
from transformer.program.spec import LayerSpec


@struct.dataclass
class GatedDelta:
    """The parameters, with M key heads and N value heads, C = 2 M Hk + N Hv channels.

    channels [E, C]; convolution [tokens, C], the newest last; gate [E, N*Hv]; decay [E, N];
    strength [E, N]; log_rate [N], the logarithm of how fast a head forgets; decay_bias [N]; norm
    [Hv]; output [N*Hv, E].
    """

    channels: Linear
    convolution: jax.Array
    gate: Linear
    decay: Linear
    strength: Linear
    log_rate: jax.Array
    decay_bias: jax.Array
    norm: Norm
    output: Linear


def mix(spec: LayerSpec, params, turn: Turn, x: jax.Array):
    """Where tokens reach each other: x [E] -> (turn, (z [N, Hv], gate [N, Hv]))."""
    channels, gate, log_decay, strength = project(spec, params, x)
    turn, channels = turn.write_read(window(spec), channels, None, params.mixer.convolution)
    q, k, v = heads(spec, channels)
    turn, z = turn.write_read(DeltaRule(spec.numerics.exact), (k, v, log_decay, strength), q)
    return turn, (z, gate)


@segment
def project(spec, params, x):
    """What the token writes and its gate: channels [C], [N, Hv], log_decay [N], strength [N]."""
    mixer, sizes = params.mixer, spec.config.delta_sizes
    x = norm(spec, params.mixer_norm, x)
    wide = lambda y: y.astype(jnp.promote_types(y.dtype, jnp.float32))
    step = spec.numerics.softplus(wide(linear(spec, mixer.decay, x)) + mixer.decay_bias)
    log_decay = spec.numerics.rounded(-spec.numerics.exp(mixer.log_rate) * step)
    strength = spec.numerics.sigmoid(wide(linear(spec, mixer.strength, x)))
    gate = linear(spec, mixer.gate, x).reshape(sizes.num_value_heads, -1)
    return linear(spec, mixer.channels, x), gate, log_decay, strength


@segment
def heads(spec, channels):
    """Channels [C] -> q [N, Hk], k [N, Hk], both of length 1 (q over sqrt(Hk)), and v [N, Hv]."""
    sizes = spec.config.delta_sizes
    M, N, H = sizes.num_key_heads, sizes.num_value_heads, sizes.key_size
    q, k, v = jnp.split(spec.numerics.silu(channels), [M * H, 2 * M * H])
    repeat = lambda x: jnp.repeat(_unit(spec, x.reshape(M, H)), N // M, axis=0)
    return spec.numerics.rounded(repeat(q) * H**-0.5), repeat(k), v.reshape(N, -1)


def output(spec, params, z):
    """What was read, normed and gated, becomes the sublayer's output: [N, Hv] -> y [E]."""
    z, gate = z
    y = rms_norm(spec, z) * params.norm.scale
    y = spec.numerics.rounded((y * spec.numerics.silu(gate.astype(y.dtype))).astype(z.dtype))
    return linear(spec, params.output, y.reshape(-1))


def window(spec) -> Window:
    """The convolution's block: the channels of the last tokens."""
    return Window(spec.config.delta_sizes.convolution, Convolution(spec.numerics))


@dataclass(frozen=True)
class Convolution:
    """A causal depthwise convolution, one token of it: cells and weights [tokens, C] -> [C]."""

    numerics: Numerics

    def __call__(self, query, cells, visible, weights):
        """The read of a `Window`."""
        del query
        wide = jnp.promote_types(cells.dtype, jnp.float32)
        terms = jnp.where(visible[:, None], cells.astype(wide) * weights.astype(wide), 0)
        return self.numerics.rounded(self.numerics.sum(terms, axis=0)[0].astype(cells.dtype))


def blocks(spec):
    """The layer's blocks, for `Cache.empty`: the convolution's and the rule's."""
    sizes, dtype = spec.config.delta_sizes, spec.config.compute_dtype
    N, wide = sizes.num_value_heads, jnp.promote_types(dtype, jnp.float32)
    shape = jax.ShapeDtypeStruct
    cell = (
        shape((N, sizes.key_size), dtype),
        shape((N, sizes.value_size), dtype),
        shape((N,), wide),
        shape((N,), wide),
    )
    return [
        (window(spec), shape((_num_channels(sizes),), dtype)),
        (DeltaRule(spec.numerics.exact), cell),
    ]


def init(spec, make, key):
    """Fresh parameters; `make` is an `init.Maker`.

    Rates of forgetting are uniform in 1..16 and steps log-uniform in 0.001..0.1, as in Mamba-2
    (arXiv:2405.21060).
    """
    E, sizes = spec.config.width, spec.config.delta_sizes
    N, H, C = sizes.num_value_heads, sizes.value_size, _num_channels(sizes)
    channels, convolution, gate, decay, strength, rate, step, output = jax.random.split(key, 8)
    step = jnp.exp(make.uniform(step, N, low=jnp.log(0.001), high=jnp.log(0.1)))
    bound = sizes.convolution**-0.5
    return GatedDelta(
        channels=make.linear(channels, E, C),
        convolution=make.uniform(convolution, sizes.convolution, C, low=-bound, high=bound),
        gate=make.linear(gate, E, N * H),
        decay=make.linear(decay, E, N),
        strength=make.linear(strength, E, N),
        log_rate=jnp.log(make.uniform(rate, N, low=1.0, high=16.0)),
        decay_bias=step + jnp.log(-jnp.expm1(-step)),  # the inverse of softplus
        norm=Norm(make.ones(H)),
        output=make.linear(output, N * H, E, biased=spec.config.biases == "all", last=True),
    )


def _num_channels(sizes):
    keys = sizes.num_key_heads * sizes.key_size
    return 2 * keys + sizes.num_value_heads * sizes.value_size


def _unit(spec, x):
    """x of length 1, in its last axis."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * spec.numerics.rsqrt(spec.numerics.sum(jnp.square(wide)) + 1e-6)
    return spec.numerics.rounded(y.astype(x.dtype))
