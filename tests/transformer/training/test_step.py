"""The training step: accumulation, averages, steps that are not finite, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import Config
from transformer.data.batches import Batch
from transformer.program.init import init_cache
from transformer.program.program import program
from transformer.training.loss import loss
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

V, T = 29, 24
ONE_LAYER = Config(vocab_size=V, max_length=T, num_layers=1, width=16, num_heads=4, num_kv_heads=2)
ROWS = 6  # of batches for compiled steps, so that they are compiled once


def optimizer_named(name):
    return make_optimizer(OptimizerConfig(name, learning_rate=0.02, warmup_steps=2), 100)


@functools.cache
def initial_state(name, ema_decay):
    return init_state(ONE_LAYER, optimizer_named(name), jax.random.key(0), ema_decay)


@functools.cache
def compiled_step(name, **options):
    return make_train_step(ONE_LAYER, optimizer_named(name), **options)


def make_step(name="adamw", **options):
    """A fresh state, which the step may take, and the step."""
    state = initial_state(name, options.get("ema_decay"))
    return jax.tree.map(jnp.copy, state), compiled_step(name, **options)


def test_accumulation_equals_the_large_batch(random_batch, assert_trees_close, rng):
    state, whole = make_step()
    other, parts = make_step(accumulate=3)
    for _ in range(3):
        # Rows of unequal weight, so that a mean of means would differ.
        batch = random_batch(rng, ROWS)
        batch = batch._replace(weights=batch.weights * np.float32([[0.1, 1, 2, 3, 4, 5]]).T)
        state, metrics = whole(state, batch)
        other, other_metrics = parts(other, batch)
        # float32 sums in another order.
        assert_trees_close(other_metrics, metrics, 1e-5)
    # Adam divides a gradient by its own size, which makes its rounding large where it is near 0;
    # measured against the largest step that three updates of 0.02 can take.
    for x, y in zip(jax.tree.leaves(other.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=0.02 * 3 * 1e-2)


def test_a_batch_that_does_not_split_is_an_error(random_batch, rng):
    state, step = make_step(accumulate=4)
    with pytest.raises(ValueError, match="6 rows cannot be run in accumulate=4"):
        step(state, random_batch(rng, ROWS))
    with pytest.raises(ValueError, match="accumulate=0"):
        make_step(accumulate=0)


def test_ema_follows_the_parameters(random_batch, assert_trees_close, rng):
    state, step = make_step(ema_decay=0.75)
    expected = jax.tree.map(np.float64, state.params)
    batch = random_batch(rng, ROWS)
    for _ in range(3):
        state, _ = step(state, batch)
        expected = jax.tree.map(
            lambda e, p: 0.75 * e + 0.25 * np.float64(p), expected, state.params
        )
    assert_trees_close(state.ema, expected, 1e-6)  # float32, three roundings
    assert int(state.step) == 3


def test_an_average_must_be_in_state_and_step_alike(random_batch, rng):
    batch = random_batch(rng, ROWS)
    with_average, without = make_step(ema_decay=0.75), make_step()
    with pytest.raises(ValueError, match="a state that has no average"):
        with_average[1](without[0], batch)
    with pytest.raises(ValueError, match="a state that has an average"):
        without[1](with_average[0], batch)
    with pytest.raises(ValueError, match="ema_decay=1"):
        make_step(ema_decay=1.0)


def test_a_step_that_is_not_finite_changes_nothing(random_batch, rng):
    batch = random_batch(rng, ROWS)
    state, step = make_step(ema_decay=0.75)
    state, metrics = step(state, batch)
    assert metrics["finite"] and int(state.step) == 1
    before = jax.tree.map(np.array, state)
    weights, tokens = batch.weights.copy(), batch.tokens.copy()
    weights[1, 3], tokens[1, 3] = np.inf, V  # an id that does not exist
    for bad in (batch._replace(weights=weights), batch._replace(tokens=tokens)):
        state, metrics = step(state, bad)
        assert not metrics["finite"] and not np.isfinite(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, state, before)
    state, metrics = step(state, batch)
    assert metrics["finite"] and int(state.step) == 2


def test_rows_longer_than_the_model_are_refused(random_batch, rng):
    state, step = make_step()
    with pytest.raises(ValueError, match=f"rows of {2 * T} tokens exceed .*max_length={T}"):
        step(state, random_batch(rng, ROWS, 2 * T))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_batch_is_memorised(random_batch, rng, name):
    batch = random_batch(rng, ROWS)
    batch = batch._replace(weights=np.ones((ROWS, T), np.float32))
    state, step = make_step(name=name)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(V)) < 0.3  # it begins knowing nothing
    # Random targets: nothing but memory takes the loss under ln(V) = 3.4.
    assert losses[-1] < 0.5 * losses[0]


def test_memory_of_a_step_grows_linearly_in_length():
    config = Config(vocab_size=16, max_length=16384, num_layers=1, width=16, num_heads=1)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    init = functools.partial(init_state, config, optimizer)
    state = jax.eval_shape(init, jax.random.key(0))
    step = make_train_step(config, optimizer)

    def memory(length):
        ints, floats = (jax.ShapeDtypeStruct((1, length), d) for d in (jnp.int32, jnp.float32))
        compiled = step.lower(state, Batch(ints, ints, ints, floats)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [memory(length) for length in (4096, 8192, 16384)]
    # Quadratic growth would approach 4.
    assert sizes[1] <= 2.2 * sizes[0] and sizes[2] <= 2.2 * sizes[1]


def test_gradient_norm_is_that_of_the_whole_gradient(random_batch, rng):
    batch = random_batch(rng, ROWS)
    state, step = make_step()
    f, cache = program(ONE_LAYER), init_cache(ONE_LAYER, T)
    objective = lambda params: loss(f, params, cache, batch)[0]
    gradients = jax.jit(jax.grad(objective))(state.params)
    _, metrics = step(state, batch)
    # float32 sums in another order.
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-5)
