"""The law of every memory: tokens that run at once are the tokens one by one."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.delta import DeltaRule
from transformer.memory.fold import Fold
from transformer.memory.latent import Latent
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import parallel

# The sums of one instruction in float64, in another order: a few hundred roundings of 1e-16.
TOLERANCE = 1e-11
CAPACITY = 24


@dataclass(frozen=True)
class Previous(Memory):
    """A memory of a user's own, written for one token only: the cell of the token before."""

    def empty(self, capacity, cell):
        return {"held": jnp.zeros(cell["x"].shape, cell["x"].dtype)}

    def step(self, block, i, cell, query, shared):
        return {"held": cell["x"]}, jnp.tanh(block["held"] * query) * shared


def attend(query, cells, visible, shared):
    """A read of one query: softmax over the cells, which also know where they lie."""
    scores = cells["key"] @ query + 0.1 * jnp.arange(len(visible)) * shared
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return {"mean": weights @ cells["value"], "peak": jnp.where(visible, scores, -9.0).max()}


def average(query, cells, visible, shared):
    """A read of a window: weights by place."""
    places = jnp.cos(jnp.arange(len(visible)) + shared)
    return jnp.where(visible, cells @ query * places, 0).sum()


def affine(a, b):
    """Composes x -> a[0] x + a[1] and then b."""
    return {"rate": a["rate"] * b["rate"], "sum": b["rate"] * a["sum"] + b["sum"]}


def normal(*shape):
    return lambda rng: rng.standard_normal(shape)


@dataclass(frozen=True)
class Case:
    """A memory with makers of one token's cell and query, and of what all share."""

    memory: Memory
    cell: object
    query: object
    shared: object = None


def delta_cell(rng):
    k, v = rng.standard_normal((2, 5)), rng.standard_normal((2, 3))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    return k, v, -rng.uniform(0, 2, 2), rng.uniform(0, 1, 2)


SOFTMAX = {"cell": (normal(2, 4), normal(2, 3)), "query": normal(4, 4)}
CASES = {
    "softmax": Case(Softmax(), **SOFTMAX),
    "softmax, sinks": Case(Softmax(scale=0.7, soft_cap=2.0), **SOFTMAX, shared=normal(4)),
    "softmax, ring": Case(Softmax(window=5), **SOFTMAX, shared=normal(4)),
    "softmax, slopes": Case(Softmax(slopes=(0.5, 0.25, 0.1, 0.05), backend="reference"), **SOFTMAX),
    "latent": Case(
        Latent(6), normal(8), (normal(3, 4), normal(3, 2)), (normal(6, 3, 4), normal(6, 3, 5))
    ),
    "cells": Case(Cells(attend), {"key": normal(4), "value": normal(2)}, normal(4), normal()),
    "window": Case(Window(4, average), normal(3), normal(3), normal()),
    "window of one": Case(Window(1, average), normal(3), normal(3), normal()),
    "fold": Case(
        Fold(affine, lambda q, s, shared: q * s["sum"] + shared, {"rate": 1.0, "sum": 0.0}),
        {"rate": lambda rng: rng.uniform(0.5, 1, 3), "sum": normal(3)},
        normal(3),
        normal(3),
    ),
    "delta rule": Case(DeltaRule(), delta_cell, normal(2, 5)),
    "user's": Case(Previous(), {"x": normal(3)}, normal(3), normal(3)),
}


def make(maker, rng, count=None):
    """What the makers of a case make; with a leading axis `count` where it is given."""
    if count is not None:
        return jax.tree.map(lambda *x: np.stack(x), *(make(maker, rng) for _ in range(count)))
    return jax.tree.map(lambda f: f(rng) if callable(f) else f, maker)


def in_float64(test):
    """Runs a test with JAX's 64-bit types."""

    @functools.wraps(test)
    def run(**given):
        with jax.enable_x64(True):
            test(**given)

    return run


def shapes(cells):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cells)


def one_by_one(memory, block, i, cells, queries, shared):
    """The scan of `step`, written out: a token at 0 begins from an empty block, -1 is padding."""
    z = []
    for n, position in enumerate(i):
        cell, query = jax.tree.map(lambda x, n=n: jnp.asarray(x[n]), (cells, queries))
        if position == 0:
            block = memory.empty(CAPACITY, shapes(cells))
        after, one = memory.step(block, jnp.int32(max(position, 0)), cell, query, shared)
        if position >= 0:
            block = after
        z.append(one if position >= 0 else jax.tree.map(jnp.zeros_like, one))
    return block, jax.tree.map(lambda *x: jnp.stack(x), *z)


def at_once(case, cache, i, cells, queries, shared, packed=False):
    """One chunk in the parallel mode, of a program that is one instruction."""

    def f(shared, cache, token, i):
        turn, z = cache.begin(i).write_read(case.memory, *token, shared)
        return turn.end(), z

    return parallel(f, shared, cache, (cells, queries), jnp.asarray(i, jnp.int32), packed)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 0, TOLERANCE), a, b)


@pytest.mark.parametrize("name", CASES)
@in_float64
def test_a_chunk_is_the_scan_of_step(name):
    """Outputs and gradients: a first chunk, one behind it with padding, packed documents."""
    case, rng = CASES[name], np.random.default_rng(list(name.encode()))
    first, second = np.arange(7), np.array([7, 8, 9, 10, -1, -1])
    packed = np.array([11, 12, 0, 1, 2, 3, 0, 1, -1])
    i = np.concatenate([first, second, packed, [2, 3]])
    cells, queries = make(case.cell, rng, len(i)), make(case.query, rng, len(i))
    shared = make(case.shared, rng)
    weigh = lambda z: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(z))

    def by_steps(cells, queries, shared):
        block = case.memory.empty(CAPACITY, shapes(cells))
        return one_by_one(case.memory, block, i, cells, queries, shared)[1]

    def by_chunks(cells, queries, shared):
        cache, z, begin = Cache.empty(CAPACITY, [(case.memory, shapes(cells))]), [], 0
        for part in (first, second, packed, [2], [3]):
            cut = lambda x, begin=begin, part=part: x[begin : begin + len(part)]
            given = jax.tree.map(cut, (cells, queries))
            cache, one = at_once(case, cache, part, *given, shared, packed=part is packed)
            z, begin = [*z, one], begin + len(part)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *z)

    operands = jax.tree.map(jnp.asarray, (cells, queries, shared))
    close(jax.jit(by_chunks)(*operands), by_steps(*operands))
    gradients = (
        jax.jit(jax.grad(lambda *x, f=f: weigh(f(*x)), argnums=(0, 1, 2)))(*operands)
        for f in (by_chunks, by_steps)
    )
    close(*gradients)


@pytest.mark.parametrize("name", CASES)
@in_float64
def test_rows_are_sequences_one_by_one(name):
    """A batch whose rows have their own positions, from blocks that were filled before."""
    case, rng = CASES[name], np.random.default_rng(list(name.encode()))
    cache = Cache.empty(CAPACITY, [(case.memory, shapes(make(case.cell, rng, 1)))])
    shared = make(case.shared, rng)
    begins, counts = [0, 3, 6], [5, 2, 0]
    rows, expected = [], []
    for begin, count in zip(begins, counts, strict=True):
        i = np.concatenate([np.arange(begin), [0] * (6 - begin)])
        cells, queries = make(case.cell, rng, 6), make(case.query, rng, 6)
        held, _ = at_once(
            case, cache, np.where(np.arange(6) < begin, i, -1), cells, queries, shared
        )
        i = np.where(np.arange(5) < count, begin + np.arange(5), -1)
        cells, queries = make(case.cell, rng, 5), make(case.query, rng, 5)
        rows.append((held, i, cells, queries))
        expected.append(at_once(case, held, i, cells, queries, shared))
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    run = lambda held, i, cells, queries: at_once(case, held, i, cells, queries, shared)
    close(jax.jit(jax.vmap(run))(*stack(rows)), stack(expected))
    one = jax.tree.map(lambda x: x[:, :1], stack(rows)[1:])
    token = jax.jit(jax.vmap(run))(stack(rows)[0], *one)
    each = [run(held, *jax.tree.map(lambda x: x[:1], rest)) for held, *rest in rows]
    close(token, stack(each))


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(list(CASES)))
def test_stacked_blocks_are_blocks(seed, name):
    """Blocks of three repeats that share one array, decoded and differentiated as they lie."""
    with jax.enable_x64(True):
        case, rng = CASES[name], np.random.default_rng(seed)
        length, shared = 5, make(case.shared, rng)
        cells, queries = (
            [make(maker, rng, length) for _ in range(3)] for maker in (case.cell, case.query)
        )
        i = jnp.arange(length, dtype=jnp.int32)
        blocks = [(case.memory, shapes(cells[0]))]
        stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x, axis=1), *trees)

        def scanned(shared, cache, token, i):
            def layers(turn, total, given):
                turn, z = turn.write_read(case.memory, *given, shared)
                return turn, jax.tree.map(lambda a, b: a + jnp.sin(b), total, z)

            turn, z = cache.begin(i).scan(layers, zeros, token)
            return turn.end(), z

        def apart(shared, cells, queries):
            z = [
                at_once(case, Cache.empty(CAPACITY, blocks), i, *given, shared)[1]
                for given in zip(cells, queries, strict=True)
            ]
            return jax.tree.map(lambda *x: sum(map(jnp.sin, x)), *z)

        one = at_once(case, Cache.empty(CAPACITY, blocks), i, cells[0], queries[0], shared)[1]
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), one)
        cache = Cache.empty(CAPACITY, blocks, repeats=3)
        tokens = stack(cells), stack(queries)

        def together(shared, tokens):
            return parallel(scanned, shared, cache, tokens, i)[1]

        def step(cache, given):
            token, i = given
            return scanned(shared, cache, token, i)

        expected = apart(shared, cells, queries)
        close(jax.jit(together)(shared, tokens), expected)
        close(jax.lax.scan(step, cache, (tokens, i))[1], expected)
        weigh = lambda z: sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(z))
        gradient = jax.jit(jax.grad(lambda x: weigh(together(*x))))((shared, tokens))
        by_shared, by_cells, by_queries = jax.jit(jax.grad(lambda x: weigh(apart(*x))))(
            (shared, cells, queries)
        )
        close(gradient, (by_shared, (stack(by_cells), stack(by_queries))))
