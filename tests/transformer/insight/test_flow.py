"""The flow of a prompt: edges by hand, cuts by hand, and its picture."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from transformer.data.tokenizer import byte_tokenizer
from transformer.insight import cut, flow, intervene, plot_flow, token_texts, without_reads
from transformer.insight.plot import label, strong
from transformer.modes.schedule import run


@pytest.mark.parametrize("kind", ["hybrid", pytest.param("attention", marks=pytest.mark.thorough)])
def test_the_flow_of_a_prompt(kind, model):
    f, params, cache, tokens = model(kind)
    tokens = tokens[:5]
    found = flow(f, params, cache, tokens)
    run_edited = lambda edits: run(intervene(f, edits), params, cache, tokens)[1]
    logits = jax.jit(run_edited, static_argnums=0)
    assert np.array_equal(found.predicted, logits(()).argmax(-1))
    blocks = {"hybrid": 3}.get(kind, 2)
    assert found.edges.shape == (5, blocks, 5, 5) and found.lens.shape == (2, 5)
    assert np.array_equal(found.lens[-1], found.predicted)
    assert found.layers == {"hybrid": (0, 0, 1)}.get(kind, (0, 1))
    # Nobody reads a later cell, and a prediction owes nothing to later readers.
    assert not np.triu(found.edges, 1).any() and not found.edges[2, :, 3:].any()
    # Only the token's own reads in the last block lead to its logits.
    assert not found.edges[4, -1, :4].any() and found.edges[4, -1, 4].all()
    probability = jax.nn.softmax(logits((cut(1, None, 2),))).max(-1)
    # float32, compiled otherwise.
    np.testing.assert_allclose(found.cut_probability[1, 2], probability, atol=1e-4)
    last = blocks - 1
    predicted, probability = without_reads(f, params, cache, found, [(last, 4, 1)])
    expected = jax.nn.softmax(logits((cut(last, 4, 1),)))
    assert np.array_equal(predicted[0], expected.argmax(-1))
    np.testing.assert_allclose(probability[0], expected.max(-1), atol=1e-4)
    with pytest.raises(ValueError, match="token 1 reading the cell of token 3 in block"):
        without_reads(f, params, cache, found, [(last, 1, 3)])
    if kind == "hybrid":
        assert found.states == (1,)
        with pytest.raises(ValueError, match="one of the blocks 0, 2, of a cell"):
            without_reads(f, params, cache, found, [(1, 3, 1)])
    figure = plot_flow(found, list("abcde"), threshold=0.3)
    [axes] = figure.axes
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    assert len(axes.lines) == len(strong(found.edges[-1], 0.3)) > 0


def test_every_token_has_a_text():
    """Also one that is a part of a character, and a special one."""
    tokenizer = byte_tokenizer()
    found = token_texts(tokenizer, [tokenizer.end_of_document, *tokenizer.encode("a é\n")])
    assert found == ["<|endoftext|>", "a", " ", "\\xc3", "\\xa9", "\n"]


def test_labels_show_what_a_token_is():
    """White space, characters that the font lacks, signs of formulas, and long runs."""
    shown = [" the", "\n  ", "$a$", "\u4e2d", "-" * 40]
    expected = ["·the", "\\n··", "$a$", "\\u4e2d", "-" * 17 + "…"]
    assert list(map(label, shown)) == expected
    still = np.zeros((5, 1, 5, 5), np.float32)
    found = SimpleNamespace(edges=still)  # of which nothing owes to anything
    figure = plot_flow(found, shown)
    assert figure.get_suptitle().startswith(f"Reads behind the prediction after {expected[-1]} (")
    assert figure._repr_png_().startswith(b"\x89PNG")
    shows = lambda figure: [x.get_text() for x in figure.axes[0].get_xticklabels()]
    assert shows(figure) == expected
    assert shows(plot_flow(found, shown, position=1)) == expected[:2]
