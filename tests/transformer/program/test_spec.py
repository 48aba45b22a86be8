"""What a layer is told: its own kind and window, whatever stands beside it."""

import jax
import numpy as np
import pytest

from transformer.config import Config, Delta, Latent
from transformer.modes.schedule import run
from transformer.program.init import init_cache
from transformer.program.layers import KINDS
from transformer.program.program import program
from transformer.program.spec import layer_specs

MIXED = Config(
    vocab_size=31,
    max_length=32,
    num_layers=4,
    width=16,
    num_heads=4,
    layer_kinds=("delta", "attention", "latent", "attention"),
    window=(None, 3, None, None),
    delta=Delta(),
    latent=Latent(rank=8, rotary_size=4),
)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("scan", [False, True])
def test_kinds_and_windows_mix(scan, cache_dtype):
    """A kind that takes no window stands beside one that has one."""
    config = MIXED.replace(scan_layers=scan, cache_dtype=cache_dtype)
    specs = layer_specs(config, KINDS)
    found = [(spec.kind, spec.config.layer_kinds, spec.config.window) for spec in specs]
    assert found == [(kind, kind, window) for kind, window in config.layers]


def test_a_model_of_both_runs_alike_in_both_modes(random_params, rng):
    config = MIXED.replace(num_layers=2, layer_kinds=("latent", "attention"), window=(None, 3))
    f, params, cache = program(config), random_params(config), init_cache(config, 16)
    tokens = rng.integers(0, 31, 10, dtype=np.int32)
    go = jax.jit(lambda chunk: run(f, params, cache, tokens, chunk=chunk)[1], static_argnums=0)
    # float32 logits of a few units, whose sums are taken in another order.
    np.testing.assert_allclose(go(None), go(1), atol=1e-4)
