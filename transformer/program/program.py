"""The transformer as a program: one token in, logits out, the cache touched by its layers."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels.backends.choice import check_backend
from transformer.axes import constrain
from transformer.config import Config
from transformer.memory.cache import Cache
from transformer.numerics.matrix import row
from transformer.numerics.numerics import FAST, Numerics
from transformer.program.fit import check_params
from transformer.program.layers import KINDS, layer
from transformer.program.linear import linear, norm
from transformer.program.params import Params
from transformer.program.spec import layer_specs


@dataclass(frozen=True)
class Program:
    """A transformer as a function of one token: f(params, cache, token, i) -> (cache, logits).

    Two programs of the same config and backend are equal, so that jax.jit knows them again.
    """

    config: Config
    attention: str = "auto"
    numerics: Numerics = FAST

    def __call__(self, params: Params, cache: Cache, token, i):
        """Runs the token at position i; see `program`."""
        cache, x = self.hidden(params, cache, token, i)
        return cache, unembed(self, params, x)

    def hidden(self, params: Params, cache: Cache, token, i):
        """The program but for its end: -> (cache, x [E]), of which `unembed` makes the logits."""
        check_params(self.config, params)
        turn = cache.begin(i)
        x = embed(self, params, token, turn.i)
        if self.config.scan_layers:
            turn, x = turn.scan(self._layers, x, params.layers)
        else:
            turn, x = self._layers(turn, x, params.layers)
        return turn.end(), x

    def _layers(self, turn, x, params):
        for spec, layer_params in zip(self._specs, params, strict=True):
            turn, x = layer(spec, layer_params, turn, x)
            x = constrain(x, None)
        return turn, x

    @functools.cached_property
    def _specs(self):
        return layer_specs(self.config, KINDS, self.attention, self.numerics)


def program(config: Config, *, numerics: str = "fast", attention: str = "auto") -> Program:
    """Makes the transformer of a config, as a function of one token.

    Args:
      config: the architecture.
      numerics: "fast" or "exact". In exact numerics a token's logits and cells have the same bits
        however it runs; see `transformer.numerics`.
      attention: the backend of attention, one of `kernels.backends.choice.BACKENDS`, or "auto".

    Returns:
      f(params, cache, token, i) -> (cache, logits [V] float32): the token at position i (scalar
      int32, below max_length; -1 is padding). `jax.vmap` over tokens and positions, with
      axis_name="positions", is the parallel mode, `jax.lax.scan` the sequential mode; see
      `schedule.run`. It raises, while it is traced, ValueError or TypeError where the parameters or
      the cache do not belong to the config.

    Raises:
      ValueError: numerics or attention name nothing that exists, or dtype is "float64" where JAX's
        64-bit types are off.
    """
    arithmetic = Numerics(numerics)
    check_backend(attention)
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError(
            "dtype='float64' needs JAX's 64-bit types; set JAX_ENABLE_X64=1, or call "
            'jax.config.update("jax_enable_x64", True) at the start.'
        )
    return Program(config, attention, arithmetic)


def embed(spec: Program, params: Params, token, i):
    """The token's embedding [E] in the compute dtype, its learned position added.

    An id or position that does not exist gives nan: JAX would take the nearest that does.
    """
    table = jax.tree.map(lambda x: constrain(jnp.asarray(x), "vocabulary", None), params.embedding)
    compute_dtype = spec.config.compute_dtype
    x = spec.numerics.narrowed(row(table, token).astype(compute_dtype))  # as generation casts it
    x = x.astype(jnp.promote_types(compute_dtype, jnp.float32))
    x = spec.numerics.rounded(x * spec.config.embedding_scale)
    if params.embedding_in is not None:
        x = linear(spec, params.embedding_in, x.astype(compute_dtype)).astype(x.dtype)
    if params.positions is not None:
        x = x + jnp.asarray(params.positions).at[i].get(mode="fill")  # -1 is padding, and takes any
    return constrain(spec.numerics.narrowed(x.astype(compute_dtype)), None)


def unembed(spec: Program, params: Params, x):
    """x [E] -> logits [V], float32."""
    x = norm(spec, params.final_norm, x)
    if params.embedding_out is not None:
        x = linear(spec, params.embedding_out, x)
    if params.output is None:
        logits = spec.numerics.dot_table(x, params.embedding)
    else:
        logits = linear(spec, params.output, x)
    logits = logits.astype(jnp.promote_types(x.dtype, jnp.float32))
    cap = spec.config.logit_soft_cap
    if cap is None:
        return logits
    return spec.numerics.rounded(cap * spec.numerics.tanh(logits / cap))
