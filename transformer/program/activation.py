"""The nonlinearity of the feed-forward network, dense or of experts."""

import jax
import jax.numpy as jnp


def activate(spec, hidden, gate=None):
    """[F] -> [F]: a nonlinearity, or that of a gate times the hidden layer (arXiv:2002.05202)."""
    config = spec.config
    if config.feed_forward == "swiglu_clipped":
        return _swiglu_clipped(spec, hidden, gate)
    function = _function(spec)
    return spec.numerics.rounded(function(gate) * hidden) if config.gated else function(hidden)


def _function(spec):
    """What is applied to the hidden layer; or to the gate, in the forms that have one."""
    kind = spec.config.feed_forward
    if kind in ("gelu", "geglu"):
        return spec.numerics.gelu
    if kind in ("gelu_exact", "geglu_exact"):
        return lambda x: spec.numerics.gelu(x, approximate=False)
    if kind == "tanh":
        return spec.numerics.tanh
    return jax.nn.relu if kind in ("relu", "reglu") else spec.numerics.silu


def _swiglu_clipped(spec, hidden, gate):
    """That of gpt-oss (arXiv:2508.10925, section 2.2): clipped, steeper, and with a residual."""
    gate = jnp.minimum(gate, 7.0)
    rounded = spec.numerics.rounded
    slope = spec.numerics.sigmoid(rounded(1.702 * gate))
    return rounded(rounded(gate * slope) * rounded(jnp.clip(hidden, -7.0, 7.0) + 1))
