"""Direct contributions: they sum up to the logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.insight import cut, direct, intervene, trace


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("gpt2", {}, marks=pytest.mark.thorough),
        pytest.param("gpt2", {"norm_placement": "post"}, marks=pytest.mark.thorough),
        ("gpt2", {"norm_placement": "both", "tie_embeddings": False}),
        ("attention", {"parallel_residual": True}),
        ("scanned", {}),
        pytest.param("window", {}, marks=pytest.mark.thorough),
        ("latent", {}),
        pytest.param("shared", {}, marks=pytest.mark.thorough),
        ("hybrid", {}),
    ],
)
def test_contributions_sum_up_to_the_logit(kind, changes, model, look):
    f, params, cache, tokens = model(kind, **changes)
    seen = look(f, params, cache, tokens)
    apart = jax.jit(lambda position, token: direct(f, params, seen, position, token))
    for position, token in ((9, 3), (4, 30)):
        made = apart(position, token)
        logit = seen.logits[position, token]
        parts = made.embedding + made.mixers.sum() + made.feed_forwards.sum() + made.biases
        scale = float(abs(made.mixers).max() + abs(made.feed_forwards).max() + 1)
        # float32: sums of numbers of the size of the parts.
        np.testing.assert_allclose(parts, logit, atol=1e-5 * scale)
        np.testing.assert_allclose(made.total, logit, atol=1e-5 * scale)
        for n, cells in enumerate(made.cells):
            if cells is None:
                assert kind == "hybrid"
                continue
            assert cells.shape == (4, 10) and not cells[:, position + 1 :].any()
            if f.config.biases == "none":  # else the mixer has a bias beside its cells
                np.testing.assert_allclose(cells.sum(), made.mixers[n], atol=1e-5 * scale)


def test_what_a_cell_contributes_is_lost_when_it_is_erased(model, look):
    """Erased from the read itself, with the weights and norms as they were."""
    f, params, cache, tokens = model("attention", num_layers=1, norm_placement="pre")
    apart = jax.jit(lambda seen: direct(f, params, seen, 9, 3))
    made = apart(look(f, params, cache, tokens))
    g = intervene(f, [cut(0, 9, 2, heads=[1])])
    other = jax.jit(lambda: direct(g, params, trace(g, params, cache, tokens), 9, 3))()
    assert made.cells[0][1, 2] != 0 and other.cells[0][1, 2] == 0
    np.testing.assert_array_equal(jnp.isfinite(other.cells[0]), True)


def test_a_difference_of_logits(model, look):
    f, params, cache, tokens = model("attention")
    seen = look(f, params, cache, tokens)
    direction = jnp.zeros(31).at[jnp.array([3, 5])].set(jnp.array([1.0, -1.0]))
    apart = jax.jit(lambda direction: direct(f, params, seen, 9, direction).mixers)
    first, second, both = map(apart, (3, 5, direction))
    # float32: the difference of two numbers of a few units.
    np.testing.assert_allclose(first - second, both, atol=1e-4)
