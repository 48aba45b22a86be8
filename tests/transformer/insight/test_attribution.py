"""Gradients by cells, and what a read is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.insight import attribution, contributions, gradients, intervene, scale, trace
from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.fold import Fold
from transformer.modes.schedule import run


@pytest.mark.parametrize(
    "kind",
    ["hybrid", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("attention", "scanned"))],
)
def test_attribution_is_the_slope_of_scaling_a_cell(kind, model):
    f, params, cache, tokens = model(kind)
    objective = lambda logits: logits[-1, 3]
    found = jax.jit(lambda: attribution(f, params, cache, tokens, objective))()
    assert found.shape == ({"hybrid": 3}.get(kind, 2), 10)

    def scaled(factor):
        return objective(run(intervene(f, [scale(1, 4, factor)]), params, cache, tokens)[1])

    # float32: two ways to the same derivative.
    np.testing.assert_allclose(found[1, 4], jax.jit(jax.grad(scaled))(1.0), atol=1e-4)


def linear(query, cells, visible, shared):
    return jnp.where(visible[:, None], cells, 0).sum(0) * query


def state(query, state, shared):
    return state * query


@pytest.mark.parametrize("memory", [Cells(linear), Window(3, linear), Fold(jnp.add, state)])
def test_contributions_of_linear_reads_are_all_of_them(memory, rng, look):
    x = np.float32(rng.standard_normal((8, 5)))

    def f(params, cache, token, i):
        turn, z = cache.begin(i).write_read(memory, params[token], jnp.cos(params[token]))
        return turn.end(), z

    seen = look(f, x, Cache.empty(8, [(memory, (5,))]), np.arange(8))
    toward = np.float32(rng.standard_normal(5))
    found = jax.jit(lambda: contributions(seen, 0, 6, toward))()
    first = 4 if isinstance(memory, Window) else 0
    expected = np.where(
        (np.arange(8) >= first) & (np.arange(8) <= 6), x @ (np.cos(x[6]) * toward), 0
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 sums of five terms
    np.testing.assert_allclose(found.sum(), seen.reads[0][6] @ toward, atol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "latent", "hybrid"])
def test_contributions_of_what_a_model_read(kind, model, look):
    """Attention is linear in values, and a delta rule in its values too: v times its derivative."""
    f, params, cache, tokens = model(kind)
    seen = look(f, params, cache, tokens)

    @jax.jit
    def of_every_block():
        toward = [jax.tree.map(lambda x: jnp.ones_like(x[7]), z) for z in seen.reads]
        return [contributions(seen, block, 7, x) for block, x in enumerate(toward)]

    for block, found in enumerate(of_every_block()):
        assert found.shape == (10,) and not found[8:].any()
        if seen.written[block].memory.__class__.__name__ != "DeltaRule":
            # float32 sums; a convolution is linear as well.
            np.testing.assert_allclose(found.sum(), seen.reads[block][7].sum(), atol=1e-4)


def test_what_cannot_be_attributed(model):
    f, params, cache, tokens = model("attention")
    with pytest.raises(ValueError, match="one of cell, query, read"):
        gradients(f, params, cache, tokens, jnp.sum, of="weights")
    seen = jax.jit(trace, static_argnums=0)(f, params, cache, tokens)
    for block, position, message in ((2, 0, "blocks 0 to 1"), (0, 10, "token 10 of 10")):
        with pytest.raises(ValueError, match=message):
            contributions(seen, block, position, seen.reads[0][0])
