"""The flow of a prompt: edges by hand, cuts by hand, and its picture."""

import jax
import numpy as np
import pytest

from transformer.insight import cut, edges, flow, intervene, plot_flow
from transformer.insight.plot import strong
from transformer.modes.schedule import run


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_the_flow_of_a_prompt(kind, model):
    f, params, cache, tokens = model(kind)
    tokens = tokens[:5]
    found = flow(f, params, cache, tokens)
    logits = run(f, params, cache, tokens)[1]
    assert np.array_equal(found.predicted, logits.argmax(-1))
    blocks = {"hybrid": 3}.get(kind, 2)
    assert found.edges.shape == (5, blocks, 5, 5) and found.lens.shape == (2, 5)
    assert np.array_equal(found.lens[-1], found.predicted)
    # Nobody reads a later cell, and a prediction owes nothing to later readers.
    assert not np.triu(found.edges, 1).any() and not found.edges[2, :, 3:].any()
    g = intervene(f, [cut(1, None, 2)])
    cut_logits = run(g, params, cache, tokens)[1]
    probability = jax.nn.softmax(cut_logits).max(-1)
    # float32, compiled otherwise.
    np.testing.assert_allclose(found.cut_probability[1, 2], probability, atol=1e-4)
    figure = plot_flow(found, list("abcde"), threshold=0.3)
    [axes] = figure.axes
    assert len(axes.lines) == len(strong(found.edges[-1], 0.3)) > 0


def test_edges_of_the_last_block_are_what_it_read(model):
    """Only the token's own reads there lead to its logits, and in attention they are linear."""
    f, params, cache, tokens = model("attention")
    found = edges(f, params, cache, tokens, lambda logits: logits[4, 3])
    assert not found[1, :4].any() and not found[1, 5:].any() and found[1, 4, :5].all()
