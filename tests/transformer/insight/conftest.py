"""Small models that the tests of insight look into."""

import jax
import numpy as np
import pytest

from transformer.config import Config, Delta, Latent
from transformer.insight import trace
from transformer.program.init import init_cache
from transformer.program.program import program

T = 10
SIZES = {"vocab_size": 31, "max_length": 32, "num_layers": 2, "width": 16, "num_heads": 4}
CONFIGS = {
    "attention": Config(**SIZES, num_kv_heads=2),
    "scanned": Config(**SIZES, num_kv_heads=2, scan_layers=True, remat="segments"),
    "window": Config(**SIZES, window=3, attention_sinks=True, positions="alibi"),
    "latent": Config(**SIZES, layer_kinds="latent", latent=Latent(rank=8, rotary_size=4)),
    "hybrid": Config(**SIZES, layer_kinds=("delta", "attention"), delta=Delta()),
    "shared": Config(**SIZES | {"num_layers": 3}, num_shared_kv_layers=1),
    "gpt2": Config(**SIZES, norm="layer", biases="all", feed_forward="gelu", positions="learned"),
}


@pytest.fixture(scope="session")
def look():
    """`trace`, compiled as a whole: one by one, its operations compile for longer."""
    return jax.jit(trace, static_argnames=("f", "start"))


@pytest.fixture
def model(random_params, rng):
    """model(name) makes (program, params, empty cache, tokens [T])."""

    def make(name, **changes):
        config = CONFIGS[name].replace(**changes)
        tokens = rng.integers(0, config.vocab_size, T, dtype=np.int32)
        params, cache = random_params(config), init_cache(config, 16)
        if config.dtype == "float64":
            params, cache = jax.tree.map(lambda x: x.astype("float64"), (params, cache))
        return program(config), params, cache, tokens

    return make
