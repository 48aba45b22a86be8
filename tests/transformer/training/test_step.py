"""Training: packing, accumulation, the loss against float64, non-finite steps, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import Config
from transformer.data.batches import Batch
from transformer.program.init import init_cache, init_params
from transformer.program.program import program
from transformer.training import evaluation
from transformer.training.loss import compute_logits, cross_entropy, loss
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

V, T = 29, 24
TINY = Config(vocab_size=V, max_length=T, num_layers=2, width=16, num_heads=4, num_kv_heads=2)
VARIANTS = {
    "rotary": TINY,
    "learned-window": TINY.replace(positions="learned", norm="layer", window=(5, None)),
    "alibi-sinks-scanned": TINY.replace(
        positions="alibi", attention_sinks=True, scan_layers=True, remat="segments"
    ),
}

ONE_LAYER = TINY.replace(num_layers=1)  # for what happens around the model


def random_batch(random, rows, length=T):
    """Rows of one document each, some targets without weight."""
    tokens, targets = random.integers(0, V, (2, rows, length), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    weights = random.choice([0.0, 0.5, 1.0], (rows, length)).astype(np.float32)
    weights[:, 0] = 1
    return Batch(tokens, targets, positions, weights)


def pack(batch, lengths):
    """The first lengths[b] tokens of each row b, one after another in one row of T."""
    short = T - sum(lengths)
    join = lambda x: np.concatenate(
        [row[:n] for row, n in zip(x, lengths, strict=True)] + [np.zeros(short, x.dtype)]
    )
    return Batch(*(join(x)[None] for x in batch))


@functools.cache
def functions(config, z_loss=0.0):
    """Parameters of a config, its loss with gradient, and its nll of each target, compiled."""
    f, cache = program(config), init_cache(config, T)
    gradient = jax.value_and_grad(
        lambda params, batch: loss(f, params, cache, batch, z_loss), has_aux=True
    )
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    # Larger than at initialization, so that attention is far from uniform.
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    return params, jax.jit(gradient), evaluation.make_eval_step(config)


def assert_trees_close(a, b, tolerance):
    """Differences, as a share of the largest element of each array."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        scale = max(float(jnp.abs(y).max()), 1e-3)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=name)


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


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_packed_documents_train_like_separate_rows(config, data):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    first = data.draw(st.integers(1, T - 1))
    lengths = [first, data.draw(st.integers(1, T - first))]
    separate = random_batch(random, 2)
    inside = np.arange(T) < np.array(lengths)[:, None]
    separate = separate._replace(weights=np.where(inside, separate.weights, 0))
    params, gradient, _ = functions(config)
    (value, _), gradients = gradient(params, separate)
    (packed_value, _), packed_gradients = gradient(params, pack(separate, lengths))
    # float32: sums in another order, over tens of terms.
    np.testing.assert_allclose(packed_value, value, rtol=2e-6)
    assert_trees_close(packed_gradients, gradients, 2e-5)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_document_does_not_see_the_one_before(config):
    random = np.random.default_rng()
    documents = random_batch(random, 2)
    lengths = [10, 14]
    other = documents._replace(tokens=documents.tokens.copy())
    other.tokens[0] = (other.tokens[0] + random.integers(1, V, T)) % V
    params, _, nll = functions(config)
    before, after = nll(params, pack(documents, lengths)), nll(params, pack(other, lengths))
    np.testing.assert_array_equal(before[0, 10:], after[0, 10:])
    assert (np.asarray(before[0, :10]) != np.asarray(after[0, :10])).all()


def test_rows_without_packing_need_no_positions():
    batch = random_batch(np.random.default_rng(), 3)
    params, gradient, _ = functions(ONE_LAYER)
    (value, _), gradients = gradient(params, batch)
    (plain_value, _), plain_gradients = gradient(params, batch._replace(positions=None))
    np.testing.assert_allclose(plain_value, value, rtol=2e-6)
    assert_trees_close(plain_gradients, gradients, 2e-5)


@jax.jit
@jax.value_and_grad
def objective(logits, targets, weights, z):
    nll, lse = cross_entropy(logits, targets)
    return ((nll + z * lse**2) * weights).sum()


@jax.jit
@jax.value_and_grad
def formula(logits, targets, weights, z):
    lse = jnp.log(jnp.exp(logits - logits.max()).sum(-1)) + logits.max()
    chosen = (logits * (targets[..., None] == jnp.arange(7))).sum(-1)
    return ((lse - chosen + z * lse**2) * weights).sum()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.1, 3.0, 50.0]), z=st.floats(0, 2))
def test_loss_and_its_gradient_match_the_formula_in_float64(seed, scale, z):
    random = np.random.default_rng(seed)
    logits = np.float32(random.normal(size=(2, 3, 7)) * scale)
    targets, weights = random.integers(0, 7, (2, 3), np.int32), random.random((2, 3))
    value, gradient = objective(logits, targets, weights, z)
    with jax.enable_x64(True):
        expected, expected_gradient = formula(np.float64(logits), targets, weights, np.float64(z))
    # float32 rounds a log-sum-exp of up to 4 scale by 6e-8 of itself; as a shift of logits - lse
    # that is a share of each softmax, and where it is squared it enters again.
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=2e-6 * scale)
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(
        gradient, expected_gradient, rtol=0, atol=1e-6 * max(1, scale) * largest
    )


def test_z_loss_is_added_to_the_objective_and_not_to_the_metric():
    batch = random_batch(np.random.default_rng(), 2)
    params, gradient, nll = functions(ONE_LAYER)
    _, with_z, _ = functions(ONE_LAYER, 0.5)
    (plain, _), _ = gradient(params, batch)
    (objective, metric), _ = with_z(params, batch)
    f, cache = program(ONE_LAYER), init_cache(ONE_LAYER, T)
    logits = jax.jit(lambda p: compute_logits(f, p, cache, batch))(params)
    lse = np.log(np.exp(np.float64(logits)).sum(-1))
    mean = lambda x: (x * batch.weights).sum() / batch.weights.sum()
    # float32 sums over 48 targets.
    np.testing.assert_allclose(metric, plain, rtol=1e-6)
    np.testing.assert_allclose(plain, mean(np.float64(nll(params, batch))), rtol=1e-6)
    np.testing.assert_allclose(objective, plain + 0.5 * mean(lse**2), rtol=2e-6)


def test_the_gradient_has_no_scatter_but_into_the_embedding():
    params, gradient, _ = functions(ONE_LAYER)
    text = gradient.lower(params, random_batch(np.random.default_rng(), 3)).compile().as_text()
    assert set(re.findall(r"= (\S+?)\{\S* scatter\(", text)) == {f"f32[{V},16]"}


def test_accumulation_equals_the_large_batch():
    random = np.random.default_rng()
    state, whole = make_step()
    other, parts = make_step(accumulate=3)
    for _ in range(3):
        # Rows of unequal weight, so that a mean of means would differ.
        batch = random_batch(random, ROWS)
        batch = batch._replace(weights=batch.weights * np.float32([[0.1, 1, 2, 3, 4, 5]]).T)
        state, metrics = whole(state, batch)
        other, other_metrics = parts(other, batch)
        # float32 sums in another order.
        assert_trees_close(other_metrics, metrics, 1e-5)
    # Adam divides a gradient by its own size, which makes its rounding large where it is near 0;
    # measured against the largest step that three updates of 0.02 can take.
    for x, y in zip(jax.tree.leaves(other.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=0.02 * 3 * 1e-2)


def test_a_batch_that_does_not_split_is_an_error():
    state, step = make_step(accumulate=4)
    with pytest.raises(ValueError, match="6 rows cannot be run in accumulate=4"):
        step(state, random_batch(np.random.default_rng(), ROWS))
    with pytest.raises(ValueError, match="accumulate=0"):
        make_step(accumulate=0)


def test_ema_follows_the_parameters():
    state, step = make_step(ema_decay=0.75)
    expected = jax.tree.map(np.float64, state.params)
    batch = random_batch(np.random.default_rng(), ROWS)
    for _ in range(3):
        state, _ = step(state, batch)
        expected = jax.tree.map(
            lambda e, p: 0.75 * e + 0.25 * np.float64(p), expected, state.params
        )
    assert_trees_close(state.ema, expected, 1e-6)  # float32, three roundings
    assert int(state.step) == 3


def test_an_average_must_be_in_state_and_step_alike():
    batch = random_batch(np.random.default_rng(), ROWS)
    with_average, without = make_step(ema_decay=0.75), make_step()
    with pytest.raises(ValueError, match="a state that has no average"):
        with_average[1](without[0], batch)
    with pytest.raises(ValueError, match="a state that has an average"):
        without[1](with_average[0], batch)
    with pytest.raises(ValueError, match="ema_decay=1"):
        make_step(ema_decay=1.0)


def test_a_step_that_is_not_finite_changes_nothing():
    batch = random_batch(np.random.default_rng(), ROWS)
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


def test_rows_longer_than_the_model_are_refused():
    longer = jax.tree.map(
        lambda x: np.repeat(x, 2, axis=1), random_batch(np.random.default_rng(), ROWS)
    )
    state, step = make_step()
    with pytest.raises(ValueError, match=f"rows of {2 * T} tokens exceed .*max_length={T}"):
        step(state, longer)
    with pytest.raises(ValueError, match=f"rows of {2 * T} tokens exceed"):
        evaluation.make_eval_step(TINY)(state.params, longer)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_batch_is_memorised(name):
    batch = random_batch(np.random.default_rng(), ROWS)
    batch = batch._replace(weights=np.ones((ROWS, T), np.float32))
    state, step = make_step(name=name)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert abs(losses[0] - np.log(V)) < 0.3  # it begins knowing nothing
    # Random targets: nothing but memory takes the loss under ln(V) = 3.4.
    assert losses[-1] < 0.5 * losses[0]


def test_evaluate_weighs_targets_and_counts_bytes():
    random = np.random.default_rng()
    batches = [random_batch(random, 2), random_batch(random, 3)]
    nlls = [random.random(batch.tokens.shape).astype(np.float32) for batch in batches]
    byte_lengths = random.integers(0, 5, V)
    by_first = {batch.tokens.shape: nll for batch, nll in zip(batches, nlls, strict=True)}
    eval_step = lambda params, batch: by_first[batch.tokens.shape]
    result = evaluation.evaluate(eval_step, None, iter(batches), byte_lengths)
    flat = lambda xs: np.concatenate([np.float64(x).ravel() for x in xs])
    weights, nats = flat(batch.weights for batch in batches), flat(nlls)
    size = byte_lengths[np.int32(flat(batch.targets for batch in batches))]
    assert result == {
        "validation_loss": pytest.approx(weights @ nats / weights.sum()),
        "validation_bits_per_byte": pytest.approx(weights @ nats / np.log(2) / (weights @ size)),
    }


def test_evaluating_nothing_is_an_error():
    with pytest.raises(ValueError, match="give at least one batch"):
        evaluation.evaluate(None, None, [], np.ones(V))


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


def test_gradient_norm_is_that_of_the_whole_gradient():
    batch = random_batch(np.random.default_rng(), ROWS)
    params, gradient, _ = functions(ONE_LAYER)
    state, step = make_step()
    state = state.replace(params=jax.tree.map(jnp.copy, params))
    _, gradients = gradient(params, batch)
    _, metrics = step(state, batch)
    # float32 sums in another order.
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-5)
