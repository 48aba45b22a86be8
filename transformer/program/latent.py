"""Layers of the kind "latent": multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

import jax
import jax.numpy as jnp
from flax import struct

from transformer.memory.cache import Turn
from transformer.memory.latent import Latent
from transformer.numerics.matrix import dense
from transformer.program.linear import Linear, Norm, linear, norm
from transformer.program.positions import rotate
from transformer.program.remat import segment
from transformer.program.spec import LayerSpec


@struct.dataclass
class LatentAttention:
    """The parameters, R the rank of the latent vector, P the numbers that carry the position.

    query_down [E, Q] and query_norm [Q], where queries have a latent vector of their own; query
    [E or Q, N*(H+P)]; down [E, R+P]; down_norm [R]; key [R, N*H]; value [R, N*Hv]; output
    [N*Hv, E].
    """

    query: Linear
    down: Linear
    down_norm: Norm
    key: Linear
    value: Linear
    output: Linear
    query_down: Linear | None = None
    query_norm: Norm | None = None


def mix(spec: LayerSpec, params, turn: Turn, x: jax.Array):
    """Where tokens reach each other: x [E] -> (turn, z [N, Hv]); params are those of the layer."""
    cell, query = project(spec, params, x, turn.i)
    of_heads = lambda p: dense(p.weight).reshape(p.weight.shape[0], spec.config.num_heads, -1)
    shared = of_heads(params.mixer.key), of_heads(params.mixer.value)
    return turn.write_read(memory(spec), cell, query, shared)


@segment
def project(spec, params, x, i):
    """What the token writes and asks: x [E] -> cell [R + P], (q [N, H], q_position [N, P])."""
    config, mixer, sizes = spec.config, params.mixer, spec.config.latent
    x = norm(spec, params.mixer_norm, x)
    latent, key = jnp.split(linear(spec, mixer.down, x), [sizes.rank])
    latent = norm(spec, mixer.down_norm, latent, sizes.norm_epsilon)
    if mixer.query_down is not None:
        x = linear(spec, mixer.query_down, x)
        x = norm(spec, mixer.query_norm, x, sizes.norm_epsilon)
    q = linear(spec, mixer.query, x).reshape(config.num_heads, -1)
    q, q_position = jnp.split(q, [config.shape.H], axis=1)
    if config.positions == "rotary":
        turn = lambda x: rotate(spec, x, i, sizes.rotary_size)
        q_position, key = turn(q_position), turn(key[None])[0]
    return jnp.concatenate([latent, key]), (q, q_position)


def output(spec, params, z):
    """What was read becomes the sublayer's output: z [N, Hv] -> y [E]."""
    return linear(spec, params.output, z.reshape(-1))


def memory(spec) -> Latent:
    """How the layer's block is written and read."""
    config = spec.config
    return Latent(
        config.latent.rank,
        config.attention_scale,
        config.attention_soft_cap,
        spec.backend,
        spec.numerics.exact,
    )


def blocks(spec):
    """The layer's blocks, for `Cache.empty`: one, of cells [R + P]."""
    size = spec.config.latent.rank + spec.config.latent.rotary_size
    return [(memory(spec), jax.ShapeDtypeStruct((size,), spec.config.compute_dtype))]


def init(spec, make, key):
    """Fresh parameters; `make` is an `init.Maker`."""
    sizes, (_, _, E, _, N, _, H, _) = spec.config.latent, spec.config.shape
    R, P, Q = sizes.rank, sizes.rotary_size, sizes.query_rank
    Hv = sizes.value_size or H
    query_down, query, down, key, value, output = jax.random.split(key, 6)
    biased = spec.config.biased("output")
    return LatentAttention(
        query=make.linear(query, Q or E, N * (H + P)),
        down=make.linear(down, E, R + P, biased=biased),
        down_norm=make.norm(R),
        key=make.linear(key, R, N * H),
        value=make.linear(value, R, N * Hv),
        output=make.linear(output, N * Hv, E, biased=biased, last=True),
        query_down=make.linear(query_down, E, Q, biased=biased) if Q else None,
        query_norm=make.norm(Q) if Q else None,
    )
