"""Optimizers: schedules, what decays, clipping, and what Muon does to matrices of every shape."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import Config
from transformer.program.init import init_params
from transformer.training.optimizer import (
    OptimizerConfig,
    learning_rate,
    make_optimizer,
    transferred,
)

SMALL = Config(vocab_size=11, max_length=8, num_layers=2, width=8, num_heads=2)
# Between them: every kind of parameter that there is.
CONFIGS = [
    SMALL.replace(positions="learned", norm="layer", biases="all", tie_embeddings=False),
    SMALL.replace(scan_layers=True, qk_norm=True, attention_sinks=True, norm_placement="both"),
    SMALL.replace(num_experts=3, scan_layers=True, biases="qkv"),
]


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree)


def random_params(config, seed=0):
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return random_like(shapes, seed)


def first_update(config, gradient, params, width=None):
    """What an optimizer does to the parameters in the first of 10 steps."""
    optimizer = make_optimizer(config, 10, width)
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradient, params)


WIDE = SMALL.replace(width=32, num_heads=8, tie_embeddings=False)  # four times its width


@pytest.mark.parametrize(("name", "of_layers"), [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_transfer_makes_steps_of_matrices_smaller_and_their_beginning(name, of_layers):
    plain = OptimizerConfig(name, warmup_steps=0, weight_decay=0.0)
    config = OptimizerConfig(name, warmup_steps=0, weight_decay=0.0, transfer=8)
    params = random_params(WIDE)
    gradient = random_like(params, 1)
    updates = first_update(plain, gradient, params)
    shares = first_update(config, gradient, params, WIDE.width)
    begins = transferred(config, params)
    # float32: a product and a quotient.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    of = lambda tree: (tree.layers[0].mixer.query.weight, tree.output.weight, tree.embedding)
    jax.tree.map(
        close, of(shares), (of(updates)[0] * of_layers, of(updates)[1] / 4, of(updates)[2])
    )
    jax.tree.map(close, of(begins), (of(params)[0] / 2, of(params)[1] / 4, of(params)[2]))
    at_its_width = random_params(SMALL.replace(tie_embeddings=False))
    jax.tree.map(close, transferred(config, at_its_width), at_its_width)


def test_transfer_needs_a_width():
    with pytest.raises(ValueError, match="transfer=8 needs the width of the model"):
        make_optimizer(OptimizerConfig(transfer=8), 1000)


def named_leaves(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@settings(deadline=None, max_examples=30)
@given(
    peak=st.floats(1e-6, 10),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 100),
    final=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_learning_rate_is_a_line_then_a_cosine(peak, warmup, decay, final, share):
    config = OptimizerConfig(learning_rate=peak, warmup_steps=warmup, final_fraction=final)
    total = warmup + decay
    schedule = learning_rate(config, total)
    step = round(share * total)
    if step <= warmup:
        expected = peak * (step + 1) / (warmup + 1)
    else:
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))
        expected = peak * (final + (1 - final) * cosine)
    # Against the peak, to which the float32 sums inside round: a few units in its last place.
    assert abs(float(schedule(step)) - expected) <= 1e-6 * peak
    assert float(schedule(total)) == pytest.approx(peak * final, abs=1e-6 * peak)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd"),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
        ("momentum", 1.0),
        ("adam_learning_rate", 0.0),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}={value!r}"):
        OptimizerConfig(**{field: value})


def test_a_warmup_of_all_steps_is_an_error():
    with pytest.raises(ValueError, match="warmup_steps=10 leaves nothing of 10 steps"):
        make_optimizer(OptimizerConfig(warmup_steps=10), 10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("config", CONFIGS)
def test_weight_decay_acts_on_the_matrices_of_layers(config, name):
    params = random_params(config)
    rate, decay = 0.1, 0.3
    optimizer = OptimizerConfig(name=name, learning_rate=rate, warmup_steps=0, weight_decay=decay)
    # With no gradient, all that moves a parameter is decay.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = named_leaves(first_update(optimizer, zeros, params))
    for path, x in named_leaves(params).items():
        axes = x.ndim - (config.scan_layers and path.startswith(".layers"))
        decays = path.startswith(".layers") and axes >= 2
        expected = -rate * decay * x if decays else jnp.zeros_like(x)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-6, err_msg=path)


def test_clipping_scales_large_gradients_down_to_the_norm():
    params = random_params(SMALL)
    clipped = make_optimizer(OptimizerConfig(warmup_steps=0, clip_norm=0.5), 10)
    plain = make_optimizer(OptimizerConfig(warmup_steps=0, clip_norm=None), 10)
    clipped_state, plain_state = clipped.init(params), plain.init(params)
    clipped_update, plain_update = jax.jit(clipped.update), jax.jit(plain.update)
    for seed, norm in enumerate([0.1, 0.5, 30.0, 2.0]):
        direction = random_like(params, seed)
        scaled_to = lambda norm, d=direction: optax.tree.scale(norm / optax.tree.norm(d), d)
        gradient, by_hand = scaled_to(norm), scaled_to(min(norm, 0.5))
        updates, clipped_state = clipped_update(gradient, clipped_state, params)
        expected, plain_state = plain_update(by_hand, plain_state, params)
        for path, update in named_leaves(updates).items():
            # float32: two roundings of the gradient, in Adam's quotient of moments.
            np.testing.assert_allclose(
                update, named_leaves(expected)[path], rtol=1e-4, atol=1e-9, err_msg=path
            )


def muon_update(params, gradient):
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=None
    )
    return first_update(config, gradient, params)


@pytest.mark.parametrize("config", CONFIGS)
def test_muon_orthogonalises_each_matrix_of_a_layer(config):
    params = random_params(config)
    updates = muon_update(params, random_like(params, 2))
    for path, update in named_leaves(updates.layers).items():
        is_matrix = update.ndim - config.scan_layers >= 2
        if not is_matrix:
            continue
        # The quintic iteration takes singular values near 1, not to 1 (its coefficients trade
        # that for speed), and shapes scale it to Adam's root mean square of 0.2.
        values = np.linalg.svd(np.asarray(update), compute_uv=False)
        values /= 0.2 * max(update.shape[-2:]) ** 0.5
        assert values.min() > 0.3 and values.max() < 1.4, path


def test_muon_moves_stacked_layers_like_single_ones():
    stacked = random_params(SMALL.replace(scan_layers=True))
    gradient = random_like(stacked, 3)
    unstack = lambda tree: tree.replace(
        layers=tuple(jax.tree.map(lambda x, r=r: x[r], tree.layers[0]) for r in range(2))
    )
    together = unstack(muon_update(stacked, gradient))
    single = muon_update(unstack(stacked), unstack(gradient))
    for path, update in named_leaves(together).items():
        # float32 through five iterations of a cubic that grows small values by 3.4 each.
        np.testing.assert_allclose(
            update, named_leaves(single)[path], rtol=1e-3, atol=1e-4, err_msg=path
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_muon_leaves_everything_else_to_adam_at_its_own_rate(config):
    params = random_params(config)
    gradient = random_like(params, 4)
    both = {"warmup_steps": 3, "weight_decay": 0.0}
    muon = OptimizerConfig(name="muon", learning_rate=0.5, adam_learning_rate=0.01, **both)
    adam = OptimizerConfig(name="adamw", learning_rate=0.01, **both)
    updates = first_update(muon, gradient, params)
    expected = first_update(adam, gradient, params)
    for path, update in named_leaves(updates).items():
        is_matrix = update.ndim - config.scan_layers >= 2 and path.startswith(".layers")
        same = np.allclose(update, named_leaves(expected)[path], rtol=1e-5)
        assert same != is_matrix, path
