"""Memories that keep cells one by one: reads written by hand, against what they amount to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import parallel

T, CAPACITY, H = 9, 12, 4


def run(memory, cells, queries, shared=None, chunk=T):
    """What tokens 0..T-1 read, in chunks."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cells)

    def f(shared, cache, token, i):
        turn, z = cache.begin(i).write_read(memory, *token, shared)
        return turn.end(), z

    @jax.jit
    def results(cells, queries, shared):
        cache, z = Cache.empty(CAPACITY, [(memory, shapes)]), []
        for begin in range(0, T, chunk):
            i = jnp.arange(begin, min(begin + chunk, T), dtype=jnp.int32)
            tokens = jax.tree.map(lambda x, i=i: x[i], (cells, queries))
            cache, one = parallel(f, shared, cache, tokens, i)
            z.append(one)
        return jnp.concatenate(z)

    return results(cells, queries, shared)


def attend(query, cells, visible, shared):
    """Attention of one head, for one query."""
    keys, values = cells
    scores = keys @ query / query.shape[0] ** 0.5
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)) @ values


@pytest.mark.parametrize("chunk", [T, 4, 1])
def test_attention_of_cells_is_softmax(chunk, rng):
    q, k, v = np.float32(rng.standard_normal((3, T, H)))
    one_head = lambda x: x[:, None]
    expected = run(Softmax(), (one_head(k), one_head(v)), one_head(q))[:, 0]
    # float32: sums of a few terms, in another order.
    np.testing.assert_allclose(run(Cells(attend), (k, v), q, chunk=chunk), expected, atol=1e-5)


def convolve(query, cells, visible, weights):
    return jnp.where(visible[:, None], cells * weights, 0).sum(0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [T, 2, 1])
def test_a_window_is_a_causal_convolution(size, chunk, rng):
    x, weights = (np.float32(rng.standard_normal((n, H))) for n in (T, size))
    expected = [np.convolve(x[:, c], weights[::-1, c])[:T] for c in range(H)]
    z = run(Window(size, convolve), x, None, weights, chunk)
    np.testing.assert_allclose(z, np.stack(expected, 1), atol=1e-5)  # float32 sums


def test_a_window_sees_nothing_before_the_first_token():
    """`visible` says which cells there are: the oldest first, the token's own last."""
    seen = run(Window(3, lambda q, cells, visible, _: visible), np.zeros(T), None)
    assert np.asarray(seen[:3]).tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1]]


def test_a_window_holds_its_own_cell_at_least():
    with pytest.raises(ValueError, match="size=0; a window holds at least 1 cell"):
        Window(0, convolve)


@pytest.mark.parametrize(("memory", "cells"), [(Cells(attend), CAPACITY), (Window(4, convolve), 4)])
def test_a_block_has_the_shapes_of_its_cells(memory, cells):
    cell = {"a": np.ones((2, 3), np.float32), "b": [np.ones((), np.int32)]}
    block = memory.empty(CAPACITY, cell)
    assert jax.tree.map(lambda x: x.shape, block) == {"a": (cells, 2, 3), "b": [(cells,)]}
    assert block["b"][0].dtype == jnp.int32
