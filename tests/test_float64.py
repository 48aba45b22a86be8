"""JAX's 64-bit types: float64 is a compute type, and float32 stays float32 where they are on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import Model, generate, init_cache, init_params, presets, program, run, score
from transformer.data.batches import Batch
from transformer.data.tokenizer import byte_tokenizer
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

# Sums of a hundred terms in another order, through a few layers: roundings of 1e-16 each.
TOLERANCE = 1e-13
MODELS = {
    "tiny": {},
    "tiny-mla": {"num_layers": 1},
    "tiny-hybrid": {"num_layers": 2, "layer_kinds": ("delta", "attention")},
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def model(name, dtype, **changes):
    config = presets[name].replace(dtype=dtype, **changes)
    params = init_params(config, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    keys = iter(jax.random.split(jax.random.key(1), 999))
    noise = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype)
    return config, jax.tree.map(noise, params)


@pytest.mark.parametrize("name", MODELS)
def test_the_modes_are_one_computation_in_float64(name, rng):
    """What is left between them in float32 is rounding: in float64 it is 1e-13 and less."""
    config, params = model(name, "float64", **MODELS[name])
    f, tokens = program(config), rng.integers(0, config.vocab_size, 21)
    logits = jax.jit(
        lambda chunk: run(f, params, init_cache(config, 24), tokens, chunk=chunk)[1],
        static_argnums=0,
    )
    parallel = logits(None)
    assert parallel.dtype == jnp.float64
    for chunk in (1, 8):
        np.testing.assert_allclose(logits(chunk), parallel, rtol=0, atol=TOLERANCE)


def test_float32_stays_float32(rng):
    config, params = model("tiny", "float32", num_experts=4, window=(6, None), scan_layers=True)
    tokens = rng.integers(0, config.vocab_size, 16)
    cache, logits = jax.jit(
        lambda: run(program(config), params, init_cache(config, 16), tokens, chunk=1)
    )()
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(cache)} == {np.dtype("float32")}
    whole = Model(config, params, byte_tokenizer())
    [completion] = generate(whole, ["ab"], max_new_tokens=3, temperature=0)
    written = [whole.tokenizer.end_of_document, *b"ab", *completion.tokens]
    # Two orders of float32 sums.
    np.testing.assert_allclose(completion.logprobs, score(whole, written)[2:], atol=1e-4)


def test_a_step_of_training(rng):
    config, _ = model("tiny", "float32", num_layers=1)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 4)
    state = init_state(config, optimizer, jax.random.key(0))
    kinds = jax.tree.map(lambda x: x.dtype, state)
    ids = rng.integers(0, config.vocab_size, (2, 9), dtype=np.int32)
    positions = np.tile(np.array([0, 1, 2, 3, 4, 0, 1, 2], np.int32), (2, 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], positions, np.ones((2, 8), np.float32))
    state, metrics = make_train_step(config, optimizer)(state, batch)
    assert metrics["finite"] and jax.tree.map(lambda x: x.dtype, state) == kinds


def test_float64_without_64_bits_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        program(presets["tiny"].replace(dtype="float64"))
