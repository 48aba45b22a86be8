"""The residual stream of a transformer, made again from what its tokens read.

With its reads given, a token needs no other: each layer runs for each token alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from transformer.config import Config
from transformer.insight.trace import Reading, Trace
from transformer.program.feed_forward import feed_forward
from transformer.program.layers import KINDS, Layer, residual
from transformer.program.linear import norm
from transformer.program.params import Params, unscanned
from transformer.program.program import embed
from transformer.program.spec import LayerSpec, layer_specs


@struct.dataclass
class Stream:
    """The residual stream of T tokens through L layers.

    Attributes:
      embedding: [T, E], what the first layer gets.
      mixers, feed_forwards: [L, T, E], what the two sublayers of each layer give, before a norm
        that comes after them.
      middle, after: [L, T, E], the stream between the two sublayers, and after both.
    """

    embedding: jax.Array
    mixers: jax.Array
    feed_forwards: jax.Array
    middle: jax.Array
    after: jax.Array

    @property
    def before(self) -> jax.Array:
        """[L, T, E], the stream before each layer."""
        return jnp.concatenate([self.embedding[None], self.after[:-1]])


class Place(NamedTuple):
    """One layer in a trace: what it is, its parameters, and its instructions."""

    spec: LayerSpec
    params: Layer
    readings: list[Reading]


def stream(f, params: Params, trace: Trace) -> Stream:
    """Makes the residual stream of a traced run.

    Args:
      f: what was traced: a program made by `program`, or one under edits.
      params: its parameters.
      trace: what `trace` gave.

    Raises:
      TypeError: f was not made by `program`.
    """
    found = list(places(f, params, trace))

    def token(token, i, zs):
        x = embedding = embed(f, params, token, i)
        parts = []
        for place, z in zip(found, zs, strict=True):
            parts.append(sublayers(place.spec, place.params, x, mixed(place, i, x, z)))
            x = parts[-1][-1]
        return embedding, *map(jnp.stack, zip(*parts, strict=True))

    zs = [[reading.z for reading in place.readings] for place in found]
    made = jax.vmap(token, out_axes=(0, 1, 1, 1, 1))(trace.tokens, trace.positions, zs)
    return Stream(*made)


def sublayers(spec: LayerSpec, params: Layer, x, z):
    """One layer of one token: x [E], what it mixed -> (mixer, feed_forward, middle, after) [E]."""
    y = KINDS[spec.kind].output(spec, params.mixer, z)
    if spec.config.parallel_residual:
        more = feed_forward(spec, params.feed_forward, norm(spec, params.feed_forward_norm, x))
        return y, more, x + y, x + y + more
    middle = residual(spec, params.mixer_post_norm, x, y)
    normed = norm(spec, params.feed_forward_norm, middle)
    more = feed_forward(spec, params.feed_forward, normed)
    return y, more, middle, residual(spec, params.feed_forward_post_norm, middle, more)


def mixed(place: Place, i, x, zs):
    """What a layer mixed, of one token whose reads are given."""
    return KINDS[place.spec.kind].mix(place.spec, place.params, _Given(i, iter(zs)), x)[1]


class _Given(NamedTuple):
    """A turn on which every read is known already."""

    i: jax.Array
    reads: Iterator[Any]

    def write_read(self, *_):
        """As of `Turn`."""
        return self, next(self.reads)

    def read(self, *_):
        """As of `Turn`."""
        return next(self.reads)


def config_of(f) -> Config:
    """The config of a program made by `program`, also under edits.

    Raises:
      TypeError: it was not made by `program`.
    """
    config = getattr(f, "config", None)
    if not isinstance(config, Config):
        raise TypeError(
            f"{f!r} was not made by program(config); only of such programs it is known what lies "
            "between two instructions."
        )
    return config


def block_layers(f, params: Params, trace: Trace) -> tuple[int, ...]:
    """The number of the layer that writes each block, of a program made by `program`."""
    return tuple(
        layer
        for layer, place in enumerate(places(f, params, trace))
        for reading in place.readings
        if not reading.again
    )


def places(f, params: Params, trace: Trace) -> Iterator[Place]:
    """The layers of a program made by `program`, each with its part of a trace."""
    config, params = unscanned(config_of(f), params)
    readings, specs = iter(trace.instructions), layer_specs(config, KINDS, numerics=f.numerics)
    for spec, layer in zip(specs, params.layers, strict=True):
        count = 1 if spec.reads is not None else len(KINDS[spec.kind].blocks(spec))
        yield Place(spec, layer, [next(readings) for _ in range(count)])
