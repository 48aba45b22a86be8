"""The nonlinearity of the feed-forward network, dense or of experts."""

import jax


def activate(config, hidden, gate):
    """[F] -> [F]: GELU, or a gate times the hidden layer (arXiv:2002.05202)."""
    if config.feed_forward == "gelu":
        return jax.nn.gelu(hidden)
    return (jax.nn.silu if config.feed_forward == "swiglu" else jax.nn.gelu)(gate) * hidden
