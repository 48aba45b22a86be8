"""The law of every memory: tokens that run at once are the tokens one by one."""

import functools
import zlib
from dataclasses import dataclass
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.delta import DeltaRule
from transformer.memory.fold import Fold
from transformer.memory.instruction import POSITIONS
from transformer.memory.latent import Latent
from transformer.memory.memory import Memory
from transformer.memory.quantised import QuantisedSoftmax
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
        before = jnp.where(i == 0, 0, block["held"])
        return {"held": cell["x"]}, jnp.tanh(before * query) * shared


def attend(query, cells, visible, shared):
    """A read of one query: softmax over the cells, which also know where they lie."""
    scores = cells["key"] @ query + 0.1 * jnp.arange(len(visible)) * shared
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    total = jax.nn.logsumexp(scores, where=visible)
    return {"mean": weights @ cells["value"], "total": total}


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
    "softmax, ring of all": Case(Softmax(window=CAPACITY), **SOFTMAX),
    "softmax, slopes": Case(Softmax(slopes=(0.5, 0.25, 0.1, 0.05), backend="reference"), **SOFTMAX),
    "softmax, int8": Case(QuantisedSoftmax(Softmax(soft_cap=2.0)), **SOFTMAX, shared=normal(4)),
    "softmax, int8, ring": Case(QuantisedSoftmax(Softmax(window=5)), **SOFTMAX),
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


every_case = pytest.mark.parametrize("name", CASES)
# Without those that differ from another one only in which cells there are.
most_cases = pytest.mark.parametrize(
    "name", [name for name in CASES if not name.endswith((" of all", " of one", "softmax"))]
)

differentiable_cases = pytest.mark.parametrize(
    "name", [name for name in most_cases.args[1] if "int8" not in name]
)


def generator(name):
    """The random numbers of a case, always the same."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def row(tree, n):
    """Element n of every array, or some of them where n is a slice."""
    return jax.tree.map(lambda x: x[n], tree)


def stack(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def shapes(cells):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cells)


def one_by_one(memory, block, i, cells, queries, shared):
    """The law: `step` for each token. One at 0 begins from an empty block, one at -1 is padding."""
    select = lambda which, new, old: jax.tree.map(partial(jnp.where, which), new, old)
    empty = jax.tree.map(
        lambda x, y: x.astype(y.dtype), memory.empty(CAPACITY, shapes(cells)), block
    )

    def token(block, given):
        i, cell, query = given
        before = select(i == 0, empty, block)
        after, z = memory.step(before, jnp.maximum(i, 0), cell, query, shared)
        after = jax.tree.map(lambda x, y: x.astype(y.dtype), after, block)
        return select(i >= 0, after, block), select(i >= 0, z, jax.tree.map(jnp.zeros_like, z))

    return jax.lax.scan(token, block, (jnp.asarray(i, jnp.int32), cells, queries))


def program_of(case):
    """A program that is one instruction."""

    def f(shared, cache, token, i):
        turn, z = cache.begin(i).write_read(case.memory, *token, shared)
        return turn.end(), z

    return f


def at_once(case, cache, i, cells, queries, shared, packed=False):
    """One chunk in the parallel mode."""
    i = jnp.asarray(i, jnp.int32)
    return parallel(program_of(case), shared, cache, (cells, queries), i, packed)


def weigh(z):
    """A number that depends on everything in z."""
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(z))


def close(a, b, tolerance=TOLERANCE):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.float64(x), np.float64(y), 0, tolerance)


@differentiable_cases
@in_float64
def test_a_chunk_is_the_scan_of_step(name):
    """Outputs and gradients: a first chunk, one behind it with padding, packed documents."""
    case, rng = CASES[name], generator(name)
    first, second = np.arange(7), np.array([7, 8, 9, 10, -1, -1])
    packed = np.array([11, 12, 0, 1, 2, 3, 0, 1, -1])
    i = np.concatenate([first, second, packed, [2]])
    cells, queries = make(case.cell, rng, len(i)), make(case.query, rng, len(i))
    shared = make(case.shared, rng)

    def by_steps(cells, queries, shared):
        block = case.memory.empty(CAPACITY, shapes(cells))
        return one_by_one(case.memory, block, i, cells, queries, shared)[1]

    def by_chunks(cells, queries, shared):
        cache, z, begin = Cache.empty(CAPACITY, [(case.memory, shapes(cells))]), [], 0
        for part in (first, second, packed, [2]):
            given = row((cells, queries), slice(begin, begin + len(part)))
            cache, one = at_once(case, cache, part, *given, shared, packed=part is packed)
            z, begin = [*z, one], begin + len(part)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *z)

    def with_gradient(f):
        objective = lambda *operands: (lambda z: (weigh(z), z))(f(*operands))
        return jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))

    operands = jax.tree.map(jnp.asarray, (cells, queries, shared))
    close(with_gradient(by_chunks)(*operands), with_gradient(by_steps)(*operands))


@functools.cache
def compiled(name, function):
    return jax.jit(partial(function, CASES[name]))


def by_steps(case, i, cells, queries, shared):
    block = case.memory.empty(CAPACITY, shapes(cells))
    return one_by_one(case.memory, block, i, cells, queries, shared)


@every_case
@settings(max_examples=5)
@given(
    chunks=st.lists(st.tuples(st.sampled_from([1, 8]), st.integers(0, 8)), min_size=1, max_size=8)
)
@in_float64
def test_any_split_into_chunks_is_the_scan_of_step(name, chunks):
    """Outputs and block, from any position, with any padding; rings shorter and longer."""
    case, rng = CASES[name], generator(name)
    cells, queries = make(case.cell, rng, CAPACITY), make(case.query, rng, CAPACITY)
    shared, begin, z = make(case.shared, rng), 0, []
    cache = Cache.empty(CAPACITY, [(case.memory, shapes(cells))])
    chunk = compiled(name, at_once)
    for size, count in chunks:
        count = min(size, count, CAPACITY - begin)
        places = np.arange(size)
        i = np.where(places < count, begin + places, -1)
        # What padding holds has no meaning: here cells of other positions.
        given = row((cells, queries), (begin + places) % CAPACITY)
        cache, one = chunk(cache, i, *given, shared)
        close(
            row(one, slice(count, None)), jax.tree.map(np.zeros_like, row(one, slice(count, None)))
        )
        z, begin = [*z, row(one, slice(count))], begin + count
    i = np.where(np.arange(CAPACITY) < begin, np.arange(CAPACITY), -1)
    block, expected = compiled(name, by_steps)(i, cells, queries, shared)
    close(jax.tree.map(lambda *x: np.concatenate(x), *z), row(expected, slice(begin)))
    close(cache, block)


@most_cases
@in_float64
def test_a_token_at_0_begins_a_sequence_whatever_the_block_holds(name):
    """A cache that served another sequence is as good as an empty one."""
    case, rng = CASES[name], generator(name)
    cells, queries = make(case.cell, rng, 5), make(case.query, rng, 5)
    shared = make(case.shared, rng)
    empty = Cache.empty(CAPACITY, [(case.memory, shapes(cells))])
    used = jax.tree.map(lambda x: (100 * rng.standard_normal(x.shape)).astype(x.dtype), empty)

    @jax.jit
    def results(cache):
        cache, first = at_once(case, cache, [0], *row((cells, queries), slice(1)), shared)
        _, rest = at_once(case, cache, np.arange(1, 5), *row((cells, queries), slice(1, 5)), shared)
        _, chunk = at_once(case, cache, np.arange(5), cells, queries, shared)
        return first, rest, chunk

    close(results(used), results(empty))


# Of reads from blocks in bfloat16, as a share of the largest number. States are sums of nine cells,
# rounded once for each in another order; that of the delta rule is never narrower than float32.
# The xla backend multiplies in the narrower type, so that queries and weights are rounded too.
ROUNDING = {Softmax: 2**-6, Latent: 2**-6, Fold: 9 * 2**-8, DeltaRule: 2**-20}


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@most_cases
@in_float64
def test_blocks_of_half_precision_are_read_as_they_are_held(name):
    """A cell is rounded when it is written, and what is read is computed from the rounded cell."""
    case, rng = CASES[name], generator(name)
    cells, queries = make(case.cell, rng, 9), make(case.query, rng, 9)
    shared, half = make(case.shared, rng), jnp.bfloat16
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, half), shapes(cells))
    cache = Cache.empty(CAPACITY, [(case.memory, given)])

    @jax.jit
    def results(cache, cells, queries):
        block = case.memory.empty(CAPACITY, given)
        expected = one_by_one(case.memory, block, np.arange(9), cells, queries, shared)
        part = lambda begin, end: (np.arange(begin, end), *row((cells, queries), slice(begin, end)))
        cache, first = at_once(case, cache, *part(0, 6), shared)
        cache, last = at_once(case, cache, *part(6, 9), shared)
        return (cache, jax.tree.map(lambda *x: jnp.concatenate(x), first, last)), expected

    (cache, z), (block, expected) = results(cache, cells, queries)
    rounding = ROUNDING.get(type(case.memory), 0)
    is_state = isinstance(case.memory, Fold | DeltaRule)
    close(cache, block, rounding * largest(block) if is_state else 0)
    close(z, expected, max(rounding * largest(expected), TOLERANCE))


@most_cases
@in_float64
def test_rows_are_sequences_one_by_one(name):
    """A batch whose rows have their own positions, from blocks that were filled before."""
    case, rng = CASES[name], generator(name)
    shared, places = make(case.shared, rng), np.arange(6)
    begins, counts = np.array([0, 3, 6]), np.array([5, 2, 0])
    before = np.where(places < begins[:, None], places, -1)
    i = np.where(places < counts[:, None], begins[:, None] + places, -1)
    tokens = [
        stack([(make(case.cell, rng, 6), make(case.query, rng, 6)) for _ in begins])
        for _ in range(2)
    ]
    empty = Cache.empty(CAPACITY, [(case.memory, shapes(row(tokens[0][0], 0)))])

    @jax.jit
    def results(before, i, tokens):
        run = lambda cache, i, token: at_once(case, cache, i, *token, shared)
        loop = lambda cache, i, token: jax.lax.map(lambda x: run(*x), (cache, i, token))
        caches = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), empty)
        filled, _ = loop(caches, before, tokens[0])
        one = row((i, tokens[1]), (slice(None), slice(1)))
        together = jax.vmap(run)
        return (
            (loop(filled, i, tokens[1]), together(filled, i, tokens[1])),
            (loop(filled, *one), together(filled, *one)),
        )

    for expected, actual in results(before, i, tokens):
        close(actual, expected)


@differentiable_cases
@in_float64
def test_axes_of_sequences_and_positions_come_in_any_order(name):
    """Also what is computed again for the gradient is the same."""
    case, rng = CASES[name], generator(name)
    shared, i = make(case.shared, rng), np.arange(5, dtype=np.int32)
    tokens = stack([(make(case.cell, rng, 5), make(case.query, rng, 5)) for _ in range(2)])
    cache = Cache.empty(CAPACITY, [(case.memory, shapes(row(tokens[0], 0)))])
    f = program_of(case)
    rows = jax.vmap(f, in_axes=(None, None, 0, None))
    positions = {"in_axes": (None, None, 1, 0), "out_axes": (None, 1), "axis_name": POSITIONS}
    inside = lambda shared, tokens: jax.vmap(lambda token: at_once(case, cache, i, *token, shared))(
        tokens
    )
    outside = lambda shared, tokens: jax.vmap(rows, **positions)(shared, cache, tokens, i)
    again = lambda shared, tokens: jax.checkpoint(inside)(shared, tokens)

    @jax.jit
    def results(shared, tokens):
        gradient = lambda g: jax.value_and_grad(lambda *x: weigh(g(*x)), argnums=(0, 1))
        return [gradient(g)(shared, tokens) for g in (inside, outside, again)]

    expected, *others = results(shared, tokens)
    for actual in others:
        close(actual, expected)


@pytest.mark.parametrize("name", ["softmax, sinks", "latent", "cells", "fold", "delta rule"])
@in_float64
def test_what_was_exported_runs_the_same(name):
    """`jax.export` of a chunk and a token after it."""
    case, rng = CASES[name], generator(name)
    cells, queries = make(case.cell, rng, 4), make(case.query, rng, 4)
    shared = make(case.shared, rng)
    cache = Cache.empty(CAPACITY, [(case.memory, shapes(cells))])

    def run(cells, queries, shared):
        filled, z = at_once(case, cache, np.arange(3), *row((cells, queries), slice(3)), shared)
        token = row((cells, queries), 3)
        after, last = program_of(case)(shared, filled, token, jnp.int32(3))
        return jax.tree.leaves((after, z, last))

    operands = cells, queries, shared
    close(jax.export.export(jax.jit(run))(*operands).call(*operands), jax.jit(run)(*operands))


@pytest.mark.parametrize(
    "name", ["softmax, sinks", "softmax, ring", "latent", "cells", "window", "fold", "delta rule"]
)
@in_float64
def test_stacked_blocks_are_blocks(name):
    """Blocks of three repeats that share one array, decoded and differentiated as they lie."""
    case, rng, length = CASES[name], generator(name), 5
    shared, i = make(case.shared, rng), jnp.arange(length, dtype=jnp.int32)
    draw = lambda: (make(case.cell, rng, length), make(case.query, rng, length))
    tokens = stack([draw() for _ in range(3)])
    blocks = [(case.memory, shapes(row(tokens[0], 0)))]
    stacked = Cache.empty(CAPACITY, blocks, repeats=3)

    def apart(shared, tokens):
        alone = lambda given: at_once(case, Cache.empty(CAPACITY, blocks), i, *given, shared)[1]
        return jax.tree.map(lambda z: jnp.sin(z).sum(0), jax.lax.map(alone, tokens))

    zeros = jax.tree.map(lambda x: np.zeros(x.shape[1:]), jax.eval_shape(apart, shared, tokens))

    def scanned(shared, cache, token, i):
        def layers(turn, total, given):
            turn, z = turn.write_read(case.memory, *given, shared)
            return turn, jax.tree.map(lambda a, b: a + jnp.sin(b), total, z)

        turn, z = cache.begin(i).scan(layers, zeros, token)
        return turn.end(), z

    def together(shared, tokens):
        by_position = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)
        return parallel(scanned, shared, stacked, by_position, i)[1]

    def one_after_another(shared, tokens):
        by_position = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)
        step = lambda cache, given: scanned(shared, cache, *given)
        return jax.lax.scan(step, stacked, (by_position, i))[1]

    @jax.jit
    def results(*operands):
        gradient = lambda f: jax.grad(lambda *x: weigh(f(*x)), argnums=(0, 1))(*operands)
        values = [f(*operands) for f in (apart, together, one_after_another)]
        return values, [gradient(f) for f in (apart, together)]

    for expected, *others in results(shared, tokens):
        for actual in others:
            close(actual, expected)
