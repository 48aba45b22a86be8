"""Layers of the kind "attention": keys and values under a softmax."""

import jax
from flax import struct

from transformer.memory.cache import Turn
from transformer.memory.quantised import QuantisedSoftmax
from transformer.memory.softmax import Softmax
from transformer.program.linear import Linear, Norm, linear, linears, norm
from transformer.program.positions import alibi_slopes, rotate
from transformer.program.remat import segment
from transformer.program.spec import LayerSpec


@struct.dataclass
class Attention:
    """query [E, N*H]; key, value [E, K*H]; output [N*H, E]; gate [E, N*H]; sinks [N].

    q_norm and k_norm are [H], or, where they act on all heads at once, [N*H] and [K*H].

    A layer that reads another one's block has no key and value of its own: they are None, as is
    k_norm.
    """

    query: Linear
    output: Linear
    key: Linear | None = None
    value: Linear | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: jax.Array | None = None
    gate: Linear | None = None


def mix(spec: LayerSpec, params, turn: Turn, x: jax.Array):
    """Where tokens reach each other: x [E] -> (turn, z [N, H]); params are those of the layer."""
    sinks = params.mixer.sinks
    if spec.reads is not None:
        z = turn.read(spec.reads, memory(spec), query(spec, params, x, turn.i), sinks)
    else:
        q, k, v = project(spec, params, x, turn.i)
        turn, z = turn.write_read(memory(spec), (k, v), q, sinks)
    return turn, z if params.mixer.gate is None else gated(spec, params, x, z)


@segment
def project(spec, params, x, i):
    """What the token asks and writes: x [E] -> q [N, H], k [K, H], v [K, H]."""
    mixer = params.mixer
    x = norm(spec, params.mixer_norm, x)
    q, k, v = linears(spec, [mixer.query, mixer.key, mixer.value], x)
    q, k = _heads(spec, q, mixer.q_norm), _heads(spec, k, mixer.k_norm)
    v = _heads(spec, v)
    if spec.config.positions == "rotary":
        q, k = rotate(spec, q, i), rotate(spec, k, i)
    return q, k, v


@segment
def query(spec, params, x, i):
    """What a token asks that writes nothing: x [E] -> q [N, H]."""
    mixer = params.mixer
    x = norm(spec, params.mixer_norm, x)
    q = _heads(spec, linear(spec, mixer.query, x), mixer.q_norm)
    return rotate(spec, q, i) if spec.config.positions == "rotary" else q


@segment
def gated(spec, params, x, z):
    """What was read, times the gate that x gives it: x [E], z [N, H] -> z [N, H]."""
    gate = linear(spec, params.mixer.gate, norm(spec, params.mixer_norm, x))
    return spec.numerics.rounded(z * spec.numerics.sigmoid(gate).reshape(z.shape))


def output(spec, params, z):
    """What was read becomes the sublayer's output: z [N, H] -> y [E]."""
    return linear(spec, params.output, z.reshape(-1))


def memory(spec) -> Softmax | QuantisedSoftmax:
    """How the layer's block is written and read."""
    config = spec.config
    slopes = alibi_slopes(config.num_heads) if config.positions == "alibi" else None
    softmax = Softmax(
        config.attention_scale,
        config.window,
        config.attention_soft_cap,
        slopes,
        spec.backend,
        spec.numerics.exact,
    )
    return softmax if config.cache_dtype is None else QuantisedSoftmax(softmax)


def blocks(spec):
    """The layer's blocks, for `Cache.empty`: one, of cells (k [K, H], v [K, H])."""
    K, H = spec.config.shape.K, spec.config.shape.H
    cell = jax.ShapeDtypeStruct((K, H), spec.config.compute_dtype)
    return [(memory(spec), (cell, cell))]


def init(spec, make, key):
    """Fresh parameters; `make` is an `init.Maker`."""
    config, (_, _, E, _, N, K, H, _) = spec.config, spec.config.shape
    query, key_, value, output, gate = jax.random.split(key, 5)
    biased, own = config.biased("qkv"), spec.reads is None
    size = (lambda heads: heads * H) if config.qk_norm_over == "all" else (lambda heads: H)
    return Attention(
        query=make.linear(query, E, N * H, biased=biased),
        output=make.linear(output, N * H, E, biased=config.biased("output"), last=True),
        key=make.linear(key_, E, K * H, biased=biased) if own else None,
        value=make.linear(value, E, K * H, biased=biased) if own else None,
        q_norm=make.norm(size(N)) if config.qk_norm else None,
        k_norm=make.norm(size(K)) if config.qk_norm and own else None,
        sinks=make.zeros(N) if config.attention_sinks else None,
        gate=make.linear(gate, E, N * H, biased=biased) if config.attention_gate else None,
    )


def _heads(spec, x, params=None):
    """All heads in a row [heads * H] -> [heads, H], normalised before or after they are parted."""
    config = spec.config
    if config.qk_norm_over == "all":
        x = norm(spec, params, x).reshape(-1, config.shape.H)
    else:
        x = norm(spec, params, x.reshape(-1, config.shape.H))
    return x if config.qkv_clip is None else x.clip(-config.qkv_clip, config.qkv_clip)
