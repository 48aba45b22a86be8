"""Adapters: what they change, and what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.presets import presets
from transformer.program.init import init_params
from transformer.training.lora import LoraConfig, init_adapters, merged
from transformer.training.step import first_state, make_train_step

SCANNED = presets["tiny"].replace(num_layers=2, width=32, num_heads=2, scan_layers=True)


def adapters_of(config, params, seed=0):
    return init_adapters(config, params, jax.random.key(seed))


def test_adapters_change_the_matrices_that_are_named():
    params = init_params(SCANNED, jax.random.key(0))
    adapters = adapters_of(LoraConfig(rank=3, alpha=6.0, targets=("query", "up")), params)
    assert set(adapters.adapters) == {
        "layers.0.mixer.query.weight",
        "layers.0.feed_forward.up.weight",
    }
    jax.tree.map(np.testing.assert_array_equal, merged(params, adapters), params)  # B is zeros
    adapters = jax.tree.map(lambda x: x + 1, adapters)
    after = merged(params, adapters)
    query = adapters.adapters["layers.0.mixer.query.weight"]
    wanted = params.layers[0].mixer.query.weight + 2 * jnp.einsum(
        "lir,lro->lio", query.a, query.b, precision="highest"
    )
    # Sums of 3 products, each rounded to 6e-8 of it.
    np.testing.assert_allclose(after.layers[0].mixer.query.weight, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        after.layers[0].mixer.key.weight, params.layers[0].mixer.key.weight
    )
    assert len(adapters_of(LoraConfig(rank=1), params).adapters) == 7


@pytest.mark.parametrize(
    "wrong, kind, message",
    [
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 1.5}, TypeError, "rank"),
        ({"rank": 1, "targets": ("queries",)}, ValueError, "choose from down, gate, key, output"),
    ],
)
def test_what_does_not_exist_is_refused(wrong, kind, message):
    params = init_params(SCANNED, jax.random.key(0))
    with pytest.raises(kind, match=message):
        adapters_of(LoraConfig(**wrong), params)


def test_a_step_changes_adapters_as_their_gradient_says(random_batch, rng):
    params = init_params(SCANNED, jax.random.key(0))
    adapters = adapters_of(LoraConfig(rank=2), params)
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    batch = random_batch(rng, 2)
    step = make_train_step(SCANNED, optax.sgd(1.0))
    state, _ = make_train_step(SCANNED, optax.sgd(1.0))(
        first_state(jax.tree.map(jnp.copy, merged(params, adapters)), optax.sgd(1.0)), batch
    )
    gradient = jax.tree.map(jnp.subtract, merged(params, adapters), state.params)
    before = jax.tree.map(np.asarray, adapters)
    base = jax.tree.map(jnp.copy, params)
    state, _ = step(first_state(adapters, optax.sgd(1.0)).replace(base=base), batch)
    jax.tree.map(np.testing.assert_array_equal, state.base, params)
    name = "layers.0.feed_forward.up.weight"
    of_matrix = gradient.layers[0].feed_forward.up.weight
    wanted = before.adapters[name].a - before.factor * jnp.einsum(
        "lio,lro->lir", of_matrix, before.adapters[name].b, precision="highest"
    )
    # The gradient is read off a difference of parameters of size 0.1, rounded to 1e-8, and summed
    # over 8 * 0.02 of 96 columns.
    np.testing.assert_allclose(state.params.adapters[name].a, wanted, rtol=1e-4, atol=2e-6)
