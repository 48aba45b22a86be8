"""The loss: packing, its gradient against float64, the z-loss."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import Config
from transformer.data.batches import Batch
from transformer.numerics.log_softmax import cross_entropy
from transformer.program.init import init_cache, init_params
from transformer.program.program import program
from transformer.training.evaluation import make_eval_step
from transformer.training.loss import compute_logits, loss

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
    if config.dtype == "float64":
        params = jax.tree.map(lambda x: x.astype(np.float64), params)
    return params, jax.jit(gradient), make_eval_step(config)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_packed_documents_train_like_separate_rows(random_batch, assert_trees_close, config, data):
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    first = data.draw(st.integers(1, T - 1))
    lengths = [first, data.draw(st.integers(1, T - first))]
    separate = random_batch(random, 2)
    inside = np.arange(T) < np.array(lengths)[:, None]
    separate = separate._replace(weights=np.where(inside, separate.weights, 0))
    with jax.enable_x64(True):
        params, gradient, _ = functions(config.replace(dtype="float64"))
        (value, _), gradients = gradient(params, separate)
        # A second row that does not count, so that what is compiled runs both.
        packed = Batch(*(np.concatenate([x, 0 * x]) for x in pack(separate, lengths)))
        (packed_value, _), packed_gradients = gradient(params, packed)
        # Sums in another order, over tens of terms of which some cancel: roundings of 1e-16 each.
        np.testing.assert_allclose(packed_value, value, rtol=1e-12)
        assert_trees_close(packed_gradients, gradients, 1e-11)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_document_does_not_see_the_one_before(random_batch, rng, config):
    documents = random_batch(rng, 2)
    lengths = [10, 14]
    other = documents._replace(tokens=documents.tokens.copy())
    other.tokens[0] = (other.tokens[0] + rng.integers(1, V, T)) % V
    params, _, nll = functions(config)
    before, after = nll(params, pack(documents, lengths)), nll(params, pack(other, lengths))
    np.testing.assert_array_equal(before[0, 10:], after[0, 10:])
    assert (np.asarray(before[0, :10]) != np.asarray(after[0, :10])).all()


def test_rows_without_packing_need_no_positions(random_batch, assert_trees_close, rng):
    batch = random_batch(rng, 3)
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


def test_z_loss_is_added_to_the_objective_and_not_to_the_metric(random_batch, rng):
    batch = random_batch(rng, 2)
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


def test_logits_made_in_parts_give_the_same_loss(
    random_batch, assert_trees_close, compiled_text, rng
):
    config = ONE_LAYER.replace(dtype="float64", logit_soft_cap=5.0, tie_embeddings=False)
    batch = random_batch(rng, 2)
    with jax.enable_x64(True):
        params, whole, _ = functions(config)
        f, cache = program(config), init_cache(config, T)
        of = lambda params, batch: loss(f, params, cache, batch, 0.5, parts=4)
        parts = jax.jit(jax.value_and_grad(of, has_aux=True))
        (value, nll), gradients = parts(params, batch)
        expected, expected_gradients = functions(config, 0.5)[1](params, batch)
        # Sums in another order, over tens of terms of which some cancel: roundings of 1e-16 each.
        np.testing.assert_allclose((value, nll), expected, rtol=1e-12)
        assert_trees_close(gradients, expected_gradients, 1e-11)
        of_all = re.compile(rf"f64\[(2,{T}|{2 * T}|{T},2|{T}),{V}\]")  # what is never there at once
        assert of_all.search(compiled_text(whole.lower(params, batch)))
        assert not of_all.search(compiled_text(parts.lower(params, batch)))


def test_logits_made_in_parts_have_the_same_bits_in_exact_numerics(random_batch, rng):
    batch, (params, _, _) = random_batch(rng, 2), functions(ONE_LAYER)
    whole, parts = (make_eval_step(ONE_LAYER, numerics="exact", loss_parts=n) for n in (1, 3))
    np.testing.assert_array_equal(parts(params, batch), whole(params, batch))


def test_logits_cannot_be_made_in_parts_of_any_program_and_number(random_batch, rng):
    batch, (params, _, _) = random_batch(rng, 2), functions(ONE_LAYER)
    f, cache = program(ONE_LAYER), init_cache(ONE_LAYER, T)
    with pytest.raises(ValueError, match="rows of 24 tokens cannot be cut into loss_parts=5"):
        loss(f, params, cache, batch, parts=5)
    with pytest.raises(ValueError, match="loss_parts=2 goes with the program of a config"):
        loss(lambda *given: f(*given), params, cache, batch, parts=2)


def test_the_gradient_has_no_scatter_but_into_the_embedding(random_batch, compiled_text, rng):
    params, gradient, _ = functions(ONE_LAYER)
    text = compiled_text(gradient.lower(params, random_batch(rng, 3)))
    assert set(re.findall(r"= (\S+?)\{\S* scatter\(", text)) == {f"f32[{V},16]"}
