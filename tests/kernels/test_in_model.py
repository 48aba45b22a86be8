"""A whole training step and generation run through kernels made for GPUs and TPUs, on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from transformer.config import Config
from transformer.data.batches import Batch
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.generate import generate
from transformer.program.init import init_params
from transformer.storage.model import Model
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

TOKENIZER = byte_tokenizer()
# A window shorter than the text, so that one layer is a ring; grouped heads; layers in a scan.
CONFIG = Config(
    vocab_size=TOKENIZER.vocab_size,
    max_length=256,
    num_layers=2,
    width=48,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    window=(24, None),
    scan_layers=True,
)


@pytest.fixture(params=["triton_interpret", "splash_interpret"])
def backend(request):
    x = jnp.zeros((1, 2, 1, 32))
    try:
        jax.eval_shape(lambda x: attention(x, x, x, backend=request.param), x)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def test_a_training_step_equals_that_of_xla(backend, rng):
    """Packed documents; loss, gradient norm, and every parameter after the step."""
    tokens, targets = rng.integers(0, CONFIG.vocab_size, (2, 2, 45), dtype=np.int32)
    cells = np.arange(45, dtype=np.int32)
    positions = np.stack([np.where(cells < cut, cells, cells - cut) for cut in (14, 33)])
    batch = Batch(tokens, targets, positions, np.ones((2, 45), np.float32))
    optimizer = make_optimizer(OptimizerConfig("adamw", warmup_steps=1), 9)

    def step(attention):
        state = init_state(CONFIG, optimizer, jax.random.key(0))
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = make_train_step(CONFIG, optimizer, attention=attention)(state, batch)
        return metrics, jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, before)

    (got, change), (want, expected) = step(backend), step("xla")
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)  # float32 rounding
    # Adam divides a gradient by its own size: where that is nothing but rounding, it decides the
    # sign of the change. Almost everywhere it is not.
    flat = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    change, expected = flat(change), flat(expected)
    close = np.abs(change - expected) < 0.02 * np.abs(expected).max()
    assert close.mean() > 0.999


def test_generation_equals_that_of_xla(backend, rng):
    """Greedy tokens of prompts of different lengths, longer than the window, in one batch."""
    params = init_params(CONFIG, jax.random.key(1))
    # At 10 times the usual size of matrices, tokens depend on all of their context.
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 and min(x.shape) > 2 else x, params)
    model = Model(CONFIG, params, TOKENIZER)
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 70)]
    choices = {"max_new_tokens": 12, "temperature": 0}
    got = generate(model, prompts, **choices, attention=backend)
    want = generate(model, prompts, **choices, attention="xla")
    for x, y in zip(got, want, strict=True):
        assert x.tokens == y.tokens
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)  # logits are of size 10
