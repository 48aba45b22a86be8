"""Whole programs lowered for a GPU and a TPU that are not there, and what their text holds."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.tracing.target import target
from transformer.config import Config
from transformer.data.batches import Batch
from transformer.inference.decode import State, decode
from transformer.inference.sampling import Sampling
from transformer.program.init import init_cache, init_params
from transformer.program.program import program
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

T = 640  # unlike every other size
CONFIG = Config(
    vocab_size=300,
    max_length=T,
    num_layers=2,
    width=256,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    dtype="bfloat16",
    scan_layers=True,
)
TARGETS = {
    "triton": ("cuda", ("gpu", 90), "@triton_kernel_call"),
    "splash": ("tpu", ("tpu",), "@tpu_custom_call"),
}


def lowered_text(function, *arguments, backend):
    """The text of a jitted function lowered for the platform of a backend."""
    name, device, call = TARGETS[backend]
    with target(*device):
        x = jnp.zeros((1, 1, 1, 32), jnp.bfloat16)
        try:
            jax.eval_shape(lambda x: attention(x, x, x, backend=backend), x)
        except NotImplementedError as error:
            pytest.skip(str(error))
        text = function.trace(*arguments).lower(lowering_platforms=(name,)).as_text()
    return text, text.count(call)


def shapes(text):
    return {tuple(map(int, s.split("x"))) for s in re.findall(r"tensor<([0-9x]*)x[a-z]", text)}


@pytest.mark.parametrize("backend", TARGETS)
def test_a_training_step_lowers_without_an_array_of_queries_by_keys(backend):
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = jax.eval_shape(partial(init_state, CONFIG, optimizer), jax.random.key(0))
    rows = lambda dtype: jax.ShapeDtypeStruct((2, T), dtype)
    batch = Batch(rows(np.int32), rows(np.int32), rows(np.int32), rows(np.float32))
    step = make_train_step(CONFIG, optimizer, attention=backend)
    text, calls = lowered_text(step, state, batch, backend=backend)
    # For all layers one forward and two of the backward pass; and keys and values are written.
    assert calls == (5 if backend == "triton" else 3)
    assert (2, T, 4, 64) in shapes(text)
    assert not any(shape.count(T) > 1 for shape in shapes(text))


@pytest.mark.parametrize("backend", TARGETS)
def test_the_decode_loop_of_generate_lowers(backend):
    rows = 3
    params = jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0))
    cache = jax.eval_shape(partial(init_cache, CONFIG, T))
    stack = lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    key = jax.ShapeDtypeStruct((rows, 2), jnp.uint32)
    state = State(jax.tree.map(stack, cache), row, row, key)
    sampling = Sampling.make(1.0, None, None, None, CONFIG.vocab_size)
    f = program(CONFIG, attention=backend)
    arguments = (f, params, state, np.ones(rows, bool), sampling, np.full(8, -1, np.int32))
    text, calls = lowered_text(decode, *arguments, np.int32(4), backend=backend)
    assert calls >= 1
    assert "stablehlo.while" in text
    assert (rows, 2, 2, T, 64) in shapes(text)
    assert not any(shape.count(T) > 1 for shape in shapes(text))
    block = "x".join(map(str, (rows, 2, 2, T, 64)))
    makers = re.findall(rf"= stablehlo\.(\w+).*-> .*tensor<{block}x", text)
    if backend == "triton":  # written in place: no operation but the kernel makes a block
        assert set(makers) == {"custom_call"}
