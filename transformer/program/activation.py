"""The nonlinearity of the feed-forward network, dense or of experts."""

from functools import partial

import jax
import jax.numpy as jnp

_exact_gelu = partial(jax.nn.gelu, approximate=False)
# What is applied to the hidden layer; or to the gate, in the forms that have one.
_FUNCTIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": _exact_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_exact": _exact_gelu,
    "reglu": jax.nn.relu,
}


def activate(spec, hidden, gate):
    """[F] -> [F]: a nonlinearity, or that of a gate times the hidden layer (arXiv:2002.05202)."""
    config = spec.config

    def activated(hidden, gate):
        if config.feed_forward == "swiglu_clipped":
            return _swiglu_clipped(hidden, gate)
        function = _FUNCTIONS[config.feed_forward]
        return function(gate) * hidden if config.gated else function(hidden)

    return spec.numerics.alone(activated)(hidden, gate)


def _swiglu_clipped(hidden, gate):
    """That of gpt-oss (arXiv:2508.10925, section 2.2): clipped, steeper, and with a residual."""
    gate = jnp.minimum(gate, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (jnp.clip(hidden, -7.0, 7.0) + 1)
