"""Exact numerics: a token's logits and cells have the same bits however it runs.

Equal bits have no tolerance, so no draw can fail by rounding. They are a claim about code that is
compiled as people compile it, so these tests run in a process of their own, which
`test_in_a_process_that_optimises` begins.
"""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transformer import Config, Model, generate, init_cache, presets, program, run, score
from transformer.config import Delta, Latent
from transformer.data.batches import Batch
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.sampling import truncated
from transformer.modes.compare import ways
from transformer.training.loss import compute_logits

SIZES = {"vocab_size": 90, "max_length": 64, "num_layers": 2, "width": 32, "num_heads": 4}
LLAMA = Config(**SIZES, num_kv_heads=2, feed_forward="swiglu", feed_forward_width=44)
GPT2 = Config(**SIZES, positions="learned", norm="layer", feed_forward="gelu", biases="all")
# A vocabulary of so many times 64 that the embedding needs no padding where it makes the logits.
TIED = LLAMA.replace(vocab_size=64, num_layers=1, num_experts=4, shared_expert_width=16)
HYBRID = LLAMA.replace(layer_kinds=("delta", "attention"), delta=Delta())
LATENT = LLAMA.replace(num_layers=1, layer_kinds="latent", latent=Latent(rank=12, rotary_size=4))
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
LENGTH = 40
DTYPES = st.sampled_from(["float32", "bfloat16"])
SEEDS = st.integers(0, 2**31 - 2)


OPTIMISED = "UNISON_TESTS_OPTIMISED"
optimised = pytest.mark.skipif(OPTIMISED not in os.environ, reason="runs in another process")


@pytest.mark.skipif(OPTIMISED in os.environ, reason="this is the other process")
def test_in_a_process_that_optimises(seed, request):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", f"--seed={seed}", __file__]
    flags = ""
    if request.config.getoption("thorough"):
        command, flags = [*command, "--thorough"], "--xla_force_host_platform_device_count=8"
    env = os.environ | {OPTIMISED: "1", "XLA_FLAGS": flags}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def tokens_of(config, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, LENGTH)
    return jnp.asarray(tokens, jnp.int32)


@partial(jax.jit, static_argnames=("config", "capacity", "chunk"))
def outcome(config, params, tokens, capacity=LENGTH, chunk=None):
    """The cells that the tokens wrote, and their logits."""
    f = program(config, numerics="exact")
    cache, logits = run(f, params, init_cache(config, capacity), tokens, chunk=chunk)
    return [x[..., :LENGTH, :] for x in jax.tree.leaves(cache)], logits


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@optimised
@settings(max_examples=1, derandomize=True)  # compiling with optimisation takes long
@given(
    config=st.from_type(Config),
    dtype=DTYPES,
    chunk=st.sampled_from([1, 7, 16, 33]),
    capacity=st.sampled_from([LENGTH, 300]),
    seed=SEEDS,
)
@example(HYBRID, "float32", 1, LENGTH, 0)
@example(TIED, "float32", 1, LENGTH, 0)
def test_any_chunk_and_any_capacity(random_params, config, dtype, chunk, capacity, seed):
    config = config.replace(dtype=dtype)
    tokens, params = tokens_of(config, seed), random_params(config, seed)
    expected = outcome(config, params, tokens)
    assert_same(outcome(config, params, tokens, capacity=capacity, chunk=chunk), expected)


@optimised
@settings(max_examples=1, derandomize=True)  # compiling with optimisation takes long
@given(
    config=st.from_type(Config),
    dtype=DTYPES,
    way=st.sampled_from(
        [
            "recompute",
            "inside the training step",
            "microbatch of 1",
            "generated in a batch",
            "reused prefix",
        ]
    ),
    seed=SEEDS,
)
@example(LATENT, "float32", "inside the training step", 0)
def test_any_way_to_run(random_params, config, dtype, way, seed):
    config = config.replace(dtype=dtype)
    tokens, params = tokens_of(config, seed), random_params(config, seed)
    one = jax.jit(ways(config, numerics="exact")[way])
    assert_same(one(params, tokens), outcome(config, params, tokens)[1])


@optimised
@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", [name for name in presets if name.startswith("tiny")])
def test_every_way_to_run_the_shapes_that_people_use(random_params, preset, dtype):
    """GPT-2, Llama, Gemma 2, gpt-oss, latent attention, hybrid; the last way on 8 devices."""
    config = presets[preset].replace(dtype=dtype)
    tokens, params = tokens_of(config), random_params(config)
    every = ways(config, numerics="exact")
    assert len(every) == 12
    logits = {name: jax.jit(way)(params, tokens) for name, way in every.items()}
    for name in logits:
        np.testing.assert_array_equal(logits[name], logits["parallel"], err_msg=name)


@optimised
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_fast_computation_to_rounding(random_params, name):
    config = CONFIGS[name].replace(num_layers=1)
    tokens, params = tokens_of(config), random_params(config)
    logits = outcome(config, params, tokens)[1]
    way = lambda params: run(program(config), params, init_cache(config, LENGTH), tokens)[1]
    fast = jax.jit(way)(params)
    # Other orders of float32 sums, through a layer.
    np.testing.assert_allclose(logits, fast, rtol=0, atol=1e-4 * np.abs(fast).max())


TOKENIZER = byte_tokenizer()
END = TOKENIZER.end_of_document


@pytest.fixture
def talkative(random_params):
    """A model that never ends a document: one number of its last norm says so."""
    config = GPT2.replace(vocab_size=257, max_length=640, tie_embeddings=False, window=(100, None))
    params = random_params(config)
    final, weight = params.final_norm, params.output.weight
    final = final.replace(scale=final.scale.at[0].set(0), bias=final.bias.at[0].set(1))
    output = params.output.replace(weight=weight.at[0, END].set(-1000))
    return Model(config, params.replace(final_norm=final, output=output), TOKENIZER)


@optimised
def test_generated_scored_and_trained(talkative):
    """512 tokens drawn in a batch, scored, and inside a training step, where they share a row."""
    config, params = talkative.config, talkative.params
    prompts = [[END, 99, 108], list(range(70)), [7]]
    temperature = np.float32(0.8)
    drawn, *_ = generate(
        talkative,
        prompts,
        max_new_tokens=512,
        temperature=temperature,
        top_k=100,
        top_p=0.95,
        numerics="exact",
        logprobs="truncated",
    )
    assert len(drawn.tokens) == 512
    row, new = jnp.asarray(prompts[0] + drawn.tokens), slice(len(prompts[0]) - 1, -1)
    scored = score(talkative, row, numerics="exact")[new.start :]
    assert_same(scored, np.float32(drawn.logprobs))

    f = program(config, numerics="exact")
    cache = init_cache(config, len(row) + 40)
    packed = jnp.stack([jnp.concatenate([row[:40], row]), jnp.arange(len(row) + 40) % 256])
    positions = jnp.concatenate([jnp.arange(40), jnp.arange(len(row))])
    positions = jnp.stack([positions, jnp.arange(len(row) + 40)])
    batch = Batch(packed, jnp.roll(packed, -1, 1), positions, jnp.ones(packed.shape))

    def objective(params):
        logits = compute_logits(f, params, cache, batch)
        nll, _ = f.numerics.cross_entropy(logits, batch.targets)
        return nll.mean(), (logits[0, 40:], -nll[0, 40:])

    @jax.jit
    def step(params):
        (_, made), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        narrowed = truncated(made[0][new], drawn.kept, temperature, f.numerics)
        nll, _ = f.numerics.cross_entropy(narrowed, row[1:][new.start :])
        return gradient, *made, -nll

    _, logits, logprobs, truncated_logprobs = step(params)
    assert_same(logprobs[new], np.float32(drawn.logprobs))
    assert_same(truncated_logprobs, np.float32(drawn.truncated_logprobs))
    one_by_one = jax.jit(lambda params: run(f, params, cache, row, chunk=1)[1])
    assert_same(logits, one_by_one(params))  # of the whole vocabulary
