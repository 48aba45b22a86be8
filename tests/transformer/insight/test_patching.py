"""Patching over pairs of prompts."""

import jax
import numpy as np
import pytest

from transformer.insight import (
    activation_patching,
    intervene,
    patch,
    path_patching,
)
from transformer.modes.schedule import run


def test_activation_patching_is_one_patch_after_the_other(model, look):
    f, params, cache, tokens = model("attention")
    other = tokens.copy()
    other[3] = (tokens[3] + 1) % 31
    metric = lambda logits: logits[-1, 7]
    found = jax.jit(lambda: activation_patching(f, params, cache, tokens, other, metric))()
    assert found.shape == (2, 10)
    number = jax.jit(lambda g, tokens: metric(run(g, params, cache, tokens)[1]), static_argnums=0)
    plain = number(f, other)
    # float32, compiled otherwise. Cells before the token that differs are the same.
    np.testing.assert_allclose(found[:, :3], plain, atol=1e-4)
    source = look(f, params, cache, tokens).cells[0]
    edits = [patch(0, [3], tuple(x[3:4] for x in source))]
    expected = number(intervene(f, edits), other)
    np.testing.assert_allclose(found[0, 3], expected, atol=1e-4)
    assert abs(found[0, 3] - plain) > 1e-3


def test_paths_of_one_block(model):
    """In the last block only the last token's own reads lead to its logits."""
    f, params, cache, tokens = model("attention")
    tokens = tokens[:6]
    other = (tokens + 1) % 31
    metric = lambda logits: logits[-1, 7]

    @jax.jit
    def patched():
        found = path_patching(f, params, cache, tokens, other, metric, block=1)
        return found, metric(run(f, params, cache, other)[1])

    found, plain = patched()
    np.testing.assert_allclose(found[:-1], plain, atol=1e-4)  # float32, compiled otherwise
    assert np.abs(found[-1] - plain).max() > 1e-3


def test_prompts_that_do_not_match_are_refused(model):
    f, params, cache, tokens = model("attention")
    metric = lambda logits: logits[-1, 7]
    with pytest.raises(ValueError, match="the prompts have 10 and 4 tokens"):
        activation_patching(f, params, cache, tokens, tokens[:4], metric)
    with pytest.raises(ValueError, match="there are blocks 0 to 1"):
        jax.jit(lambda: path_patching(f, params, cache, tokens, tokens, metric, block=2))()
