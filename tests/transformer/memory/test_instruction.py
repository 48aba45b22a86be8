"""What `vmap` means for the instruction: the name of the mapped axis says it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.fold import Fold
from transformer.memory.instruction import POSITIONS, ProgramError
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import parallel, run
from transformer.presets import presets
from transformer.program.init import init_cache, init_params
from transformer.program.program import program

# float32: sums of a few terms, in another order.
TOLERANCE = 1e-5
CAPACITY, PREFIX = 12, 5
K, N, H = 2, 4, 3


class Token(NamedTuple):
    """What one token of these programs writes and asks: k, v [K, H], q [N, H]."""

    k: Any
    v: Any
    q: Any


def random_tokens(rng, *shape):
    return Token(*(np.float32(rng.standard_normal((*shape, n, H))) for n in (K, K, N)))


def attend(query, cells, visible, shared):
    scores = cells[0].sum((1, 2)) * query.sum() + jnp.arange(len(visible)) * shared.sum()
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return jnp.einsum("s,skh->kh", weights, cells[1])


def weigh(query, cells, visible, shared):
    places = jnp.cos(jnp.arange(len(visible)) * shared.sum())
    return jnp.where(visible, cells[0].sum((1, 2)) * places, 0).sum() * query


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def read_sum(query, state, shared):
    return (query * shared[:, None]).sum() * state[0] + state[1]


class Own(Memory):
    """A memory for one token only: the running sum of cells."""

    def empty(self, capacity, cell):
        return jnp.zeros(cell[0].shape, cell[0].dtype)

    def step(self, block, i, cell, query, shared):
        block = jnp.where(i == 0, 0, block) + cell[0]
        return block, jnp.tanh(block.sum() * query * shared[:, None])


MEMORIES = {
    "softmax": Softmax(soft_cap=3.0),
    "ring": Softmax(window=4),
    "cells": Cells(attend),
    "window": Window(3, weigh),
    "fold": Fold(add, read_sum),
    "user's": Own(),
}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
# What is fused, and what follows from one token.
two_memories = pytest.mark.parametrize(
    "memory", [MEMORIES[name] for name in ("softmax", "fold")], ids=["softmax", "fold"]
)


def program_of(memory):
    """A program of one layer: it writes and reads a block, and reads it again the other way up."""

    def f(sinks, cache, token, i):
        turn, z = cache.begin(i).write_read(memory, token[:2], token.q, sinks)
        again = turn.read(0, memory, -token.q, sinks)
        return turn.end(), jnp.tanh(z) + again

    return f


def empty(memory):
    return Cache.empty(CAPACITY, [(memory, ((K, H), (K, H)))])


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * scale)


@every_memory
def test_candidates_behind_a_shared_prefix_are_sequences(memory, rng):
    """Tokens at one position, in an axis that has no name: each as if it came alone."""
    f, sinks = program_of(memory), np.float32(rng.standard_normal(N))
    prefix, candidates = random_tokens(rng, PREFIX), random_tokens(rng, 3)

    @jax.jit
    def results(prefix, candidates):
        held, _ = parallel(f, sinks, empty(memory), prefix, jnp.arange(PREFIX))
        alone = jax.lax.map(lambda token: f(sinks, held, token, jnp.int32(PREFIX)), candidates)
        over = lambda i, mapped: jax.vmap(f, in_axes=(None, None, 0, mapped))(
            sinks, held, candidates, i
        )
        return alone, over(jnp.full(3, PREFIX), 0), over(jnp.int32(PREFIX), None)

    alone, *together = results(prefix, candidates)
    for each in together:
        close(each, alone)


@two_memories
def test_candidates_may_be_of_several_tokens(memory, rng):
    """Chunks behind a shared prefix, in either order of the two axes."""
    f, sinks = program_of(memory), np.float32(rng.standard_normal(N))
    prefix, candidates = random_tokens(rng, PREFIX), random_tokens(rng, 3, 4)

    @jax.jit
    def results(prefix, candidates):
        held, _ = parallel(f, sinks, empty(memory), prefix, jnp.arange(PREFIX))
        i = PREFIX + jnp.arange(4, dtype=jnp.int32)
        chunk = lambda tokens: parallel(f, sinks, held, tokens, i)
        rows = jax.vmap(f, in_axes=(None, None, 0, None))
        positions = {"in_axes": (None, None, 1, 0), "out_axes": (None, 1), "axis_name": POSITIONS}
        outside = jax.vmap(rows, **positions)(sinks, held, candidates, i)
        return jax.lax.map(chunk, candidates), jax.vmap(chunk)(candidates), outside

    alone, *together = results(prefix, candidates)
    for each in together:
        close(each, alone)


def test_sequences_may_be_mapped_more_than_once(rng):
    """Two axes of sequences [2, 3] and one of 4 positions, in every order."""
    memory, sinks = MEMORIES["softmax"], np.float32(rng.standard_normal(N))
    f, tokens = program_of(memory), random_tokens(rng, 2, 3, 4)
    caches = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), empty(memory))
    i = jnp.arange(4, dtype=jnp.int32)

    def sequences(g):
        return jax.vmap(g, in_axes=(None, 0, 0, None))

    def positions(g, axis):
        options = {"out_axes": (None, axis), "axis_name": POSITIONS}
        return jax.vmap(g, in_axes=(None, None, axis, 0), **options)

    @jax.jit
    def results(tokens):
        one = lambda x: positions(f, 0)(sinks, *x, i)
        return (
            jax.lax.map(lambda x: jax.lax.map(one, x), (caches, tokens)),
            sequences(sequences(positions(f, 0)))(sinks, caches, tokens, i),
            sequences(positions(sequences(f), 1))(sinks, caches, tokens, i),
            positions(sequences(sequences(f)), 2)(sinks, caches, tokens, i),
        )

    alone, *together = results(tokens)
    for each in together:
        close(each, alone)


def one_token():
    """(sinks, cache, token, i) of a program of attention."""
    token = Token(jnp.ones((K, H)), jnp.ones((K, H)), jnp.ones((N, H)))
    return jnp.ones(N), empty(MEMORIES["softmax"]), token, jnp.int32(0)


def repeated(tree, *shape):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *jnp.shape(x))), tree)


@pytest.mark.parametrize(
    ("in_axes", "message"),
    [
        ((None, None, 0, None), r"all tokens .* at the same position i; map i too"),
        ((None, 0, 0, 0), r"the block differs from position to position of one sequence"),
        ((0, None, 0, 0), r"`shared` differs from token to token"),
    ],
    ids=["unmapped i", "mapped block", "mapped shared"],
)
def test_tokens_of_one_sequence_share_what_they_must(in_axes, message):
    f = jax.vmap(program_of(MEMORIES["softmax"]), in_axes=in_axes, axis_name=POSITIONS)
    given = zip(one_token(), in_axes, strict=True)
    given = [x if axis is None else repeated(x, 3) for x, axis in given]
    with pytest.raises(ProgramError, match=message):
        jax.eval_shape(f, *given)


def test_positions_are_one_axis():
    f = program_of(MEMORIES["softmax"])
    for _ in range(2):
        f = jax.vmap(f, in_axes=(None, None, 0, 0), out_axes=(None, 0), axis_name=POSITIONS)
    sinks, cache, *token = one_token()
    with pytest.raises(ProgramError, match="mapped inside of another one"):
        jax.eval_shape(f, sinks, cache, *repeated(token, 2, 3))


@two_memories
@pytest.mark.parametrize("own", [True, False], ids=["own caches", "one cache"])
def test_what_all_share_may_differ_from_model_to_model(memory, own, rng):
    """An ensemble: `shared` mapped over an axis that is not of positions is `lax.map`."""
    f, sinks = program_of(memory), np.float32(rng.standard_normal((2, N)))
    tokens, i = random_tokens(rng, 4), jnp.arange(4, dtype=jnp.int32)
    cache = empty(memory)
    caches = jax.tree.map(lambda x: jnp.stack([x, x + 1]), cache)

    def each(sinks, cache):
        """A chunk, and a token after it."""
        cache, z = parallel(f, sinks, cache, tokens, i)
        return z, f(sinks, cache, jax.tree.map(lambda x: x[-1], tokens), jnp.int32(4))

    @jax.jit
    def results(sinks):
        given, mapped = (caches, 0) if own else (cache, None)
        alone = jax.lax.map(lambda x: each(x[0], x[1] if own else cache), (sinks, caches))
        together = jax.vmap(each, in_axes=(0, mapped))(sinks, given)
        models = jax.vmap(f, in_axes=(0, mapped, None, None))
        positions = {"in_axes": (None, None, 0, 0), "out_axes": (None, 1), "axis_name": POSITIONS}
        _, inside = jax.vmap(models, **positions)(sinks, given, tokens, i)
        return alone, together, inside

    alone, together, inside = results(sinks)
    close(together, alone)
    close(inside, alone[0])


@two_memories
def test_gradients_of_each_sequence_and_of_all(memory, rng):
    """vmap of grad, grad of vmap and grad of a loop are one; also where `shared` is mapped."""
    f, sinks = program_of(memory), np.float32(rng.standard_normal(N))
    tokens, i = random_tokens(rng, 3, 4), jnp.arange(4, dtype=jnp.int32)

    def loss(sinks, tokens):
        return jnp.sin(parallel(f, sinks, empty(memory), tokens, i)[1]).sum()

    @jax.jit
    def results(sinks, tokens):
        gradient = lambda g: jax.grad(g, argnums=(0, 1))
        alone = jax.lax.map(lambda x: gradient(loss)(sinks, x), tokens)
        rows = jax.vmap(loss, in_axes=(None, 0))
        of_rows = gradient(lambda *x: rows(*x).sum())(sinks, tokens)
        rows_of = jax.vmap(gradient(loss), in_axes=(None, 0))(sinks, tokens)
        models = jax.vmap(gradient(loss))(jnp.stack([sinks] * 3), tokens)
        return alone, of_rows, rows_of, models

    alone, of_rows, rows_of, models = results(sinks, tokens)
    close(of_rows, (alone[0].sum(0), alone[1]))
    close(rows_of, alone)
    close(models, alone)


def test_an_ensemble_of_transformers_is_vmap():
    """Parameters, with sinks among them, are mapped, and so the memory's `shared`."""
    config = presets["tiny"].replace(num_layers=1, attention_sinks=True, scan_layers=True)

    def each(params):
        return run(program(config), params, init_cache(config, 4), np.arange(4))

    @jax.jit
    def results(keys):
        params = jax.vmap(lambda key: init_params(config, key))(keys)
        params = jax.tree.map(lambda x: x + 0.1, params)
        return jax.lax.map(each, params), jax.vmap(each)(params)

    alone, together = results(jax.random.split(jax.random.key(0), 2))
    close(together, alone)
