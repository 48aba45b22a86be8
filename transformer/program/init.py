"""Fresh parameters, and empty caches."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import nn

from transformer.config import Config
from transformer.memory.cache import Cache
from transformer.program.dense import FeedForward
from transformer.program.experts import Experts
from transformer.program.layers import KINDS, Layer
from transformer.program.linear import Linear, Norm
from transformer.program.params import Params
from transformer.program.spec import layer_specs


@dataclass(frozen=True)
class Maker:
    """Makes the arrays of a config, float32.

    Matrices are normal with standard deviation 0.02, those that end a sublayer divided by
    sqrt(2 L) (GPT-2); norms are ones, biases zeros.
    """

    config: Config

    def matrix(self, key, *shape, last=False):
        """A matrix [..., in, out]; `last` where it ends a sublayer."""
        deviation = 0.02 / (2 * self.config.num_layers) ** 0.5 if last else 0.02
        return nn.initializers.normal(deviation)(key, shape, jnp.float32)

    def linear(self, key, *shape, biased=False, last=False):
        """Matrices [..., in, out], with a bias or without one."""
        weight = self.matrix(key, *shape, last=last)
        return Linear(weight, self.zeros(*shape[:-2], shape[-1]) if biased else None)

    def norm(self, size):
        """A norm that changes no scale."""
        biased = self.config.norm == "layer" and self.config.biased("norms")
        return Norm(self.ones(size), self.zeros(size) if biased else None)

    def uniform(self, key, *shape, low, high):
        """Numbers between low and high."""
        return jax.random.uniform(key, shape, jnp.float32, low, high)

    def ones(self, *shape):
        """Ones."""
        return jnp.ones(shape, jnp.float32)

    def zeros(self, *shape):
        """Zeros."""
        return jnp.zeros(shape, jnp.float32)


def init_params(config: Config, key: jax.Array) -> Params:
    """Makes fresh parameters, float32, from a key of `jax.random.key`.

    Matrices are normal with standard deviation 0.02, those that end a sublayer divided by
    sqrt(2 L) (GPT-2); norms are ones, biases and sinks zeros.
    """
    make, E = Maker(config), config.width
    embedding, positions, output, layers = jax.random.split(key, 4)
    into, back = jax.random.split(jax.random.fold_in(key, 1))
    D = config.embedding_width
    keys = jax.random.split(layers, config.num_layers)
    specs = layer_specs(config, KINDS)
    if config.scan_layers:
        keys = keys.reshape(-1, len(specs))
        stacked = lambda n, spec: jax.vmap(lambda key: _init_layer(spec, make, key))(keys[:, n])
        made = tuple(stacked(n, spec) for n, spec in enumerate(specs))
    else:
        made = tuple(_init_layer(spec, make, key) for spec, key in zip(specs, keys, strict=True))
    learned = config.positions == "learned"
    return Params(
        embedding=make.matrix(embedding, config.vocab_size, D or E),
        layers=made,
        positions=make.matrix(positions, config.max_length, E) if learned else None,
        final_norm=make.norm(E) if config.norm_placement != "post" else None,
        output=None if config.tie_embeddings else make.linear(output, D or E, config.vocab_size),
        embedding_in=make.linear(into, D, E) if D else None,
        embedding_out=make.linear(back, E, D) if D else None,
    )


def _init_layer(spec, make, key):
    mixer, feed_forward = jax.random.split(key)
    placement = spec.config.norm_placement
    before = lambda: make.norm(spec.config.width) if placement in ("pre", "both") else None
    after = lambda: make.norm(spec.config.width) if placement != "pre" else None
    return Layer(
        KINDS[spec.kind].init(spec, make, mixer),
        _init_feed_forward(spec.config, make, feed_forward),
        mixer_norm=before(),
        mixer_post_norm=after(),
        feed_forward_norm=before(),
        feed_forward_post_norm=after(),
    )


def _init_feed_forward(config, make, key):
    E, F, X = config.width, config.shape.F, config.num_experts
    if not X:
        return FeedForward(**_init_network(config, make, key, F))
    experts, router, shared, gate = jax.random.split(key, 4)
    width, biased = config.shared_expert_width, config.biased("feed_forward")
    gated = width and config.shared_expert_gate
    return Experts(
        router=make.linear(router, E, X, biased=biased),
        **_init_network(config, make, experts, config.expert_width or F, X),
        choice_bias=make.zeros(X) if config.sigmoid_gates else None,
        shared=FeedForward(**_init_network(config, make, shared, width)) if width else None,
        shared_gate=make.linear(gate, E, 1, biased=biased) if gated else None,
    )


def _init_network(config, make, key, width, *experts):
    up, down, gate = jax.random.split(key, 3)
    E, biased = config.width, config.biased("feed_forward")
    return {
        "up": make.linear(up, *experts, E, width, biased=biased),
        "down": make.linear(down, *experts, width, E, biased=biased, last=True),
        "gate": make.linear(gate, *experts, E, width, biased=biased) if config.gated else None,
    }


def init_cache(config: Config, capacity: int, dtype=None) -> Cache:
    """Makes an empty cache for one sequence; give it a leading axis for a batch of sequences.

    Args:
      config: the architecture.
      capacity: how many positions fit, at least 1. A layer with a window gets at most `window`
        cells.
      dtype: of the cells; None: the compute dtype. States of the delta rule are at least float32.

    Raises:
      ValueError: capacity is below 1.
    """
    blocks = [
        block
        for spec in layer_specs(config, KINDS)
        if spec.reads is None
        for block in KINDS[spec.kind].blocks(spec)
    ]
    if dtype is not None:
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
        blocks = [(memory, jax.tree.map(cast, cell)) for memory, cell in blocks]
    repeats = config.num_layers // len(config.pattern) if config.scan_layers else None
    return Cache.empty(capacity, blocks, repeats=repeats)
