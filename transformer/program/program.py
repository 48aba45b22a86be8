"""The transformer as a program: one token in, logits out, the cache touched once per layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import nn

from kernels.backends.choice import check_backend
from transformer.config import Config
from transformer.memory.cache import Block, Cache
from transformer.program.experts import Experts
from transformer.program.layers import (
    Attention,
    FeedForward,
    Layer,
    Linear,
    Norm,
    layer,
    linear,
    norm,
)


@struct.dataclass
class Params:
    """All parameters of a transformer, float32.

    embedding: [V, E]. positions: [max_length, E] where they are learned.
    layers: one `Layer` per layer; where layers are scanned, one per layer of the window pattern,
      whose arrays have a leading axis of repeats.
    output: [E, V] where it is not tied to the embedding.
    """

    embedding: jax.Array
    layers: tuple[Layer, ...]
    positions: jax.Array | None = None
    final_norm: Norm | None = None
    output: Linear | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.shape[0]


def program(config: Config, *, numerics: str = "fast", attention: str = "auto") -> Callable:
    """The transformer as a function of one token.

    Args:
      config: the architecture.
      numerics: "fast".
      attention: the backend of `kernels.attention`.

    Returns:
      f(params, cache, token, i, cell=None) -> (cache, logits [V] float32): the token at position i
      (scalar int32, below max_length), with `cell` as in `Cache.begin`. `jax.vmap` over tokens and
      positions is the parallel mode, `jax.lax.scan` the sequential mode; see `schedule.run`.

    Raises:
      ValueError: numerics or attention name nothing that exists.
    """
    if numerics != "fast":
        raise ValueError(f"numerics={numerics!r} does not exist; choose 'fast'.")
    check_backend(attention)
    layers = [config.replace(window=window) for window in config.windows]

    def f(params: Params, cache: Cache, token, i, cell=None):
        i = jnp.asarray(i, jnp.int32)
        x = embed(config, params, token, i)
        if not config.scan_layers:
            cache, x = _through(layers, params.layers, cache.begin(cell, None, attention), x, i)
            return cache, unembed(config, params, x)

        def repeat(carry, inputs):
            cache, x = carry
            r, stacked = inputs
            return _through(layers, stacked, cache.begin(cell, r, attention), x, i), None

        repeats = jnp.arange(config.num_layers // len(config.pattern), dtype=jnp.int32)
        (cache, x), _ = jax.lax.scan(repeat, (cache, x), (repeats, params.layers))
        return cache, unembed(config, params, x)

    return f


def _through(layers, params, cache, x, i):
    for config, layer_params in zip(layers, params, strict=False):
        cache, x = layer(config, layer_params, cache, x, i)
    return cache.end(), x


def embed(config: Config, params: Params, token, i):
    """The token's embedding [E] in the compute dtype, its learned position added.

    An id or position that does not exist gives nan: JAX would take the nearest that does.
    """
    x = params.embedding.at[token].get(mode="fill", wrap_negative_indices=False)
    x = x * config.embedding_scale
    if params.positions is not None:
        x = x + params.positions.at[i].get(mode="fill")  # -1 is padding, and takes any
    return x.astype(config.compute_dtype)


def unembed(config: Config, params: Params, x):
    """x [E] -> logits [V], float32."""
    x = norm(config, params.final_norm, x)
    if params.output is None:
        logits = x @ params.embedding.T.astype(x.dtype)  # E first: vmap then needs no transpose
    else:
        logits = linear(params.output, x)
    logits = logits.astype(jnp.promote_types(x.dtype, jnp.float32))
    if config.logit_soft_cap is None:
        return logits
    return config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)


def init_cache(config: Config, capacity: int, dtype=None) -> Cache:
    """An empty cache for one sequence; give it a leading axis for a batch of sequences.

    Args:
      config: the architecture.
      capacity: positions that fit, at least 1. A layer with a window gets at most `window` cells.
      dtype: of keys and values; None: the compute dtype.

    Raises:
      ValueError: capacity is below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}; a cache holds at least 1 position.")
    dtype = config.compute_dtype if dtype is None else dtype
    repeats = (config.num_layers // len(config.pattern),) if config.scan_layers else ()
    windows = config.pattern if config.scan_layers else config.windows

    def block(window):
        size = capacity if window is None else min(window, capacity)
        shape = (*repeats, config.num_kv_heads, size, config.head_size)
        return Block(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return Cache(tuple(block(window) for window in windows), capacity=capacity)


def init_params(config: Config, key: jax.Array) -> Params:
    """Fresh parameters, float32.

    Matrices are normal with standard deviation 0.02, those that end a sublayer divided by
    sqrt(2 L) (GPT-2); norms are ones, biases and sinks zeros.
    """
    make = nn.initializers.normal(0.02)
    make_last = nn.initializers.normal(0.02 / (2 * config.num_layers) ** 0.5)
    E, F, X = config.width, config.feed_forward_width, config.num_experts
    query_size = config.num_heads * config.head_size
    kv_size = config.num_kv_heads * config.head_size
    gated = config.feed_forward != "gelu"

    def init_norm(size, used=True):
        bias = jnp.zeros(size) if config.norm == "layer" and config.biases == "all" else None
        return Norm(jnp.ones(size), bias) if used else None

    def init_linear(key, shape, make=make, biased=config.biases == "all"):
        return Linear(make(key, shape), jnp.zeros(shape[-1]) if biased else None)

    def init_feed_forward(key):
        up, down, gate, router = jax.random.split(key, 4)
        if X:
            gate = make(gate, (X, E, F)) if gated else None
            return Experts(
                make(router, (E, X)), make(up, (X, E, F)), make_last(down, (X, F, E)), gate
            )
        return FeedForward(
            init_linear(up, (E, F)),
            init_linear(down, (F, E), make_last),
            init_linear(gate, (E, F)) if gated else None,
        )

    def init_attention(key):
        query, key_, value, output = jax.random.split(key, 4)
        qkv_biased = config.biases != "none"
        return Attention(
            init_linear(query, (E, query_size), biased=qkv_biased),
            init_linear(key_, (E, kv_size), biased=qkv_biased),
            init_linear(value, (E, kv_size), biased=qkv_biased),
            init_linear(output, (query_size, E), make_last),
            q_norm=init_norm(config.head_size, config.qk_norm),
            k_norm=init_norm(config.head_size, config.qk_norm),
            sinks=jnp.zeros(config.num_heads) if config.attention_sinks else None,
        )

    def init_layer(key):
        attention, feed_forward = jax.random.split(key)
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        return Layer(
            init_attention(attention),
            init_feed_forward(feed_forward),
            attention_norm=init_norm(E, before),
            attention_post_norm=init_norm(E, after),
            feed_forward_norm=init_norm(E, before),
            feed_forward_post_norm=init_norm(E, after),
        )

    embedding, positions, output, layers = jax.random.split(key, 4)
    keys = jax.random.split(layers, config.num_layers)
    if config.scan_layers:
        period = len(config.pattern)
        keys = keys.reshape(-1, period)
        stacks = tuple(jax.vmap(init_layer)(keys[:, n]) for n in range(period))
    else:
        stacks = tuple(init_layer(key) for key in keys)
    learned = config.positions == "learned"
    return Params(
        embedding=make(embedding, (config.vocab_size, E)),
        layers=stacks,
        positions=make(positions, (config.max_length, E)) if learned else None,
        final_norm=init_norm(E, config.norm_placement != "post"),
        output=None
        if config.tie_embeddings
        else init_linear(output, (E, config.vocab_size), biased=False),
    )
