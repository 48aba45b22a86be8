"""Traces: what the tokens wrote, asked and read, in the shapes of each memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.insight import cut, intervene, patch
from transformer.modes.schedule import run
from transformer.program.init import init_cache
from transformer.program.program import program

T = 10


@pytest.mark.parametrize("kind", ["attention", "scanned", "window", "latent", "hybrid", "shared"])
def test_a_trace_is_a_run(kind, model, look):
    f, params, cache, tokens = model(kind)
    seen = look(f, params, cache, tokens)
    after, logits = jax.jit(run, static_argnums=0)(f, params, cache, tokens)
    np.testing.assert_allclose(seen.logits, logits, atol=1e-4)  # float32, compiled otherwise
    assert jax.tree.map(jnp.shape, seen.cache) == jax.tree.map(jnp.shape, after)
    for x in jax.tree.leaves((seen.cells, seen.queries, seen.reads)):
        assert len(x) == T
    assert len(seen.cells) == {"hybrid": 3}.get(kind, 2)
    assert len(seen.instructions) == 3 if kind in ("hybrid", "shared") else 2


@pytest.mark.parametrize("kind", ["attention", "scanned", "window", "latent"])
def test_weights_make_what_was_read(kind, model, look):
    f, params, cache, tokens = model(kind)
    seen = look(f, params, cache, tokens)
    for block, reading in enumerate(seen.written):
        weights = seen.weights(block)
        assert weights.shape == (4, T, T) and not np.triu(weights, 1).any()
        if kind == "latent":
            value = jnp.einsum("sr,rnh->snh", reading.cells[:, :8], reading.shared[1])
        else:
            value = reading.cells[1].repeat(4 // reading.cells[1].shape[1], axis=1)
        z = jnp.einsum("nts,snh->tnh", weights, value)
        np.testing.assert_allclose(z, seen.reads[block], atol=1e-5)  # float32 sums of ten terms
        tiles = [tile for _, tile in seen.tiles(block, size=4)]
        np.testing.assert_array_equal(np.concatenate(tiles, axis=1), weights)
        np.testing.assert_array_equal(seen.weights(block, [3, 5]), weights[:, [3, 5]])


def test_scanned_layers_are_numbered_as_if_they_were_not(model, look):
    f, params, cache, tokens = model("scanned")
    config = f.config.replace(scan_layers=False)
    apart = [jax.tree.map(lambda x, n=n: x[n], params.layers[0]) for n in range(2)]
    expected = look(
        program(config), params.replace(layers=tuple(apart)), init_cache(config, 16), tokens
    )
    seen = look(f, params, cache, tokens)
    for x, y in zip(seen.written, expected.written, strict=True):
        assert x.block == y.block
        for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)  # float32, compiled otherwise


@pytest.mark.parametrize("kind", ["attention", "window"])
def test_a_trace_goes_on_from_a_cache(kind, model, look):
    f, params, cache, tokens = model(kind)
    whole = look(f, params, cache, tokens)
    filled = look(f, params, cache, tokens[:6]).cache
    rest = look(f, params, filled, tokens[6:], start=6)
    np.testing.assert_allclose(rest.weights(1), whole.weights(1)[:, 6:], atol=1e-5)  # float32


def test_a_trace_under_edits_shows_them(model, look):
    f, params, cache, tokens = model("attention")
    g = intervene(f, [cut(1, 6, [2, 3], heads=[1])])
    weights = look(g, params, cache, tokens).weights(1)
    assert not weights[1, 6, [2, 3]].any()
    assert weights[0, 6, 2] > 0 and weights[1, 5, 2] > 0
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)  # float32


def test_a_patch_from_another_prompt(model, look):
    """All cells of a block, from another prompt: all that comes later is as of the other one."""
    f, params, cache, tokens = model("attention")
    other = (tokens + 1) % 31
    source = look(f, params, cache, other)
    patched = intervene(f, [patch(b, np.arange(T), source.cells[b]) for b in range(2)])
    seen = look(patched, params, cache, tokens)
    for x, y in zip(*map(jax.tree.leaves, (seen.cells, source.cells)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_weights_of_a_block_that_is_read_again(model, look):
    """Each read has its own query, and so its own weights of the same cells."""
    f, params, cache, tokens = model("shared")
    seen = look(f, params, cache, tokens)
    assert [(x.block, x.again) for x in seen.instructions] == [(0, False), (1, False), (1, True)]
    value = seen.cells[1][1].repeat(4 // seen.cells[1][1].shape[1], axis=1)
    for read, z in ((0, seen.reads[1]), (1, seen.instructions[2].z)):
        made = jnp.einsum("nts,snh->tnh", seen.weights(1, read=read), value)
        np.testing.assert_allclose(made, z, atol=1e-5)  # float32 sums of ten terms
    for wrong, message in (
        (lambda: seen.weights(0, read=1), "block 0 was read 1 time"),
        (lambda: seen.weights(2), "blocks 0 to 1"),
        (lambda: seen.weights(0, [3, 10]), "token 10 of 10"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_what_has_no_weights_says_so(model, look):
    f, params, cache, tokens = model("hybrid")
    with pytest.raises(ValueError, match=r"block 1 is kept by DeltaRule.*no weights"):
        look(f, params, cache, tokens).weights(1)
