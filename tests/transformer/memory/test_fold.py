"""States that are combined: against sums written out, with every kind of identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.memory.cache import Cache
from transformer.memory.fold import Fold
from transformer.modes.schedule import parallel

T, H = 9, 3


def run(memory, cells, queries, positions=None, chunk=T, packed=False):
    """What tokens read, in chunks."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cells)
    positions = np.arange(T) if positions is None else positions

    def f(params, cache, token, i):
        turn, z = cache.begin(i).write_read(memory, *token)
        return turn.end(), z

    @jax.jit
    def results(cells, queries):
        cache, z = Cache.empty(T, [(memory, shapes)]), []
        for begin in range(0, T, chunk):
            part = slice(begin, begin + chunk)
            tokens = jax.tree.map(lambda x, part=part: x[part], (cells, queries))
            i = jnp.asarray(positions[part], jnp.int32)
            cache, one = parallel(f, None, cache, tokens, i, packed)
            z.append(one)
        return jnp.concatenate(z)

    return np.asarray(results(cells, queries))


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def linear_attention(query, state, shared):
    return query @ state[0] / (query @ state[1])


@pytest.mark.parametrize("chunk", [T, 4, 1])
def test_linear_attention_is_a_fold(chunk, rng):
    q, k, v = rng.uniform(0.1, 1, (3, T, H)).astype(np.float32)
    cells = (k[:, :, None] * v[:, None], k)
    weights = np.tril(np.float64(q) @ k.T)
    expected = weights @ v / weights.sum(1, keepdims=True)
    z = run(Fold(add, linear_attention), cells, q, chunk=chunk)
    np.testing.assert_allclose(z, expected, rtol=1e-5)  # float32 sums of positive terms


@pytest.mark.parametrize(
    "identity",
    [
        np.eye(2, dtype=np.float32),
        lambda cell: jnp.eye(cell.shape[0], dtype=cell.dtype),
        jnp.eye(2),
    ],
    ids=["numpy", "function", "jax"],
)
@pytest.mark.parametrize("chunk", [T, 2, 1])
def test_elements_are_combined_in_order(identity, chunk, rng):
    """Products of matrices, which do not commute."""
    matrices = np.float32(rng.standard_normal((T, 2, 2)))
    memory = Fold(lambda a, b: a @ b, lambda q, state, _: state, identity)
    expected = np.stack([np.linalg.multi_dot([np.eye(2), *matrices[: t + 1]]) for t in range(T)])
    z = run(memory, matrices, np.zeros(T), chunk=chunk)
    np.testing.assert_allclose(z, expected, atol=1e-4 * np.abs(expected).max())


def test_the_identity_may_be_infinite_and_padding_leaves_it_alone():
    """A running maximum, with padding that would win."""
    cells = np.float32([-3, -5, -1, -2, 9, 9, 9, 9, 9])
    positions = np.array([0, 1, 2, 3, -1, -1, -1, -1, -1])
    memory = Fold(jnp.maximum, lambda q, state, _: state, -np.inf)
    for chunk in (T, 3, 1):
        z = run(memory, cells, np.zeros(T), positions, chunk)
        assert z.tolist() == [-3, -3, -1, -1, 0, 0, 0, 0, 0]


def test_states_begin_again_with_each_packed_document():
    memory = Fold(jnp.add, lambda q, state, _: state)
    positions = np.array([0, 1, 2, 0, 1, 0, 0, 1, -1])
    z = run(memory, np.arange(1, T + 1), np.zeros(T), positions, packed=True)
    assert z.tolist() == [1, 3, 6, 4, 9, 6, 7, 15, 0]


def test_folds_of_the_same_functions_and_numbers_are_equal():
    read = lambda q, state, _: state
    make = lambda e: Fold(add, read, e)
    assert make((0.0, np.zeros(2))) == make((0.0, np.zeros(2)))
    assert hash(make((0.0, np.zeros(2)))) == hash(make((0.0, np.zeros(2))))
    for other in ((0.0, np.ones(2)), (0.0, np.zeros(3)), [0.0, np.zeros(2)], 0.0):
        assert make((0.0, np.zeros(2))) != make(other)
    assert Fold(jnp.add, read) != Fold(jnp.maximum, read)
