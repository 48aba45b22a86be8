"""Presets: they have the published sizes, describe themselves in JSON, and are programs."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from transformer.config import Config
from transformer.modes.schedule import run
from transformer.presets import presets
from transformer.program.init import init_cache, init_params
from transformer.program.program import program


def param_shapes(config):
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


@pytest.mark.parametrize("name", presets)
def test_a_preset_survives_json(name):
    config = presets[name]
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config


# Parameter counts that the models' authors give, to the million.
@pytest.mark.parametrize(
    "name, millions",
    [
        ("gpt2", 124),
        ("gpt2-medium", 355),
        ("gpt2-large", 774),
        ("gpt2-xl", 1558),
        ("llama-1b", 1236),
    ],
)
def test_presets_have_the_published_size(name, millions):
    params = param_shapes(presets[name])
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == millions


@pytest.mark.parametrize("name", ["tiny", "tiny-mla", "tiny-hybrid", "small", "gpt2", "llama-1b"])
@pytest.mark.parametrize("chunk", [None, 1], ids=["parallel", "sequential"])
def test_a_preset_is_a_program(name, chunk):
    config = presets[name]
    tokens = jax.ShapeDtypeStruct((3,), jnp.int32)
    cache, logits = jax.eval_shape(
        lambda params, tokens: run(
            program(config), params, init_cache(config, 8), tokens, chunk=chunk
        ),
        param_shapes(config),
        tokens,
    )
    assert logits.shape == (3, config.vocab_size) and logits.dtype == jnp.float32
    assert cache.capacity == 8
