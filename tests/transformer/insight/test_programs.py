"""Programs of examples/ looked into and changed: all sorts of memories, one of them its own."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.insight import (
    add,
    attribution,
    contributions,
    cut,
    edit,
    hooks,
    intervene,
    lens,
    patch,
    replace,
    scale,
    stream,
    trace,
)
from transformer.memory.cache import Cache
from transformer.memory.cells import Cells
from transformer.modes.contract import check_contract
from transformer.modes.depth import depth
from transformer.modes.schedule import run

T, CAPACITY = 9, 12
NAMES = "linear_attention", "looped_scan", "recurrent", "shared_keys", "token_shift"
# A loop written out is what the loop is, and a test below says so.
programs = pytest.mark.parametrize(
    "name", [*NAMES, pytest.param("looped", marks=pytest.mark.thorough)]
)


def example(name, dtype="float64"):
    """A program of the examples: (program, params, empty cache, tokens [T])."""
    module = importlib.import_module(f"examples.programs.{name}")
    params, cache = module.init(jax.random.key(0)), module.empty(CAPACITY)
    params, cache = jax.tree.map(lambda x: x.astype(dtype), (params, cache))
    return module.program, params, cache, np.arange(3, 3 + T) * 5 % module.VOCAB_SIZE


def some_edits(name, cells):
    """Every sort of edit that the program's memory can take, of its first and its last block."""
    last = len(cells) - 1
    edits = [
        scale(0, 5, 0.5),
        add(last, [2], 0.1, of="read"),
        patch(last, [4, 6], jax.tree.map(lambda x: x[:2] + 0.1, cells[last])),
        replace(0, 1, 0.0, of="read"),
        edit(last, [3, 8], lambda x: jax.tree.map(jnp.tanh, x)),
    ]
    if name not in ("recurrent", "token_shift"):  # which read without a query
        edits.append(scale(last, [5], 1.1, of="query"))
    if name in ("looped", "looped_scan", "shared_keys", "token_shift"):
        edits.append(cut(last, [4, 7], [3, 6]))
    return edits if name == "recurrent" else [*edits, cut(0, None, 3)]


@programs
def test_they_are_traced_and_edited_in_every_mode(name, look):
    with jax.enable_x64(True):
        f, params, cache, tokens = example(name)
        seen = look(f, params, cache, tokens)
        g = intervene(f, some_edits(name, seen.cells))
        go = jax.jit(
            lambda f, chunk=None: run(f, params, cache, tokens, chunk=chunk), static_argnums=(0, 1)
        )
        plain, edited = go(f)[1], go(g)[1]
        # float64 sums of up to 64 numbers of a few units, in another order, through a few layers.
        close = dict(atol=1e-10)
        np.testing.assert_allclose(seen.logits, plain, **close)
        changed = np.abs(edited - plain).max(1)
        assert changed[0] < 1e-10 < 1e-6 < changed[1:].min()
        for x, y in zip(*map(jax.tree.leaves, (go(g, 1), go(g))), strict=True):
            np.testing.assert_allclose(x, y, **close)
        rows = jax.jit(jax.vmap(lambda tokens: run(g, params, cache, tokens, chunk=4)[1]))
        np.testing.assert_allclose(rows(jnp.stack([tokens, tokens]))[1], edited, **close)
        slope = jax.jit(jax.grad(lambda params: run(g, params, cache, tokens)[1].sum()))(params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
        assert depth(g, params, cache, T) == depth(f, params, cache, T)


@programs
@pytest.mark.thorough
def test_under_edits_they_are_lawful(name, look):
    f, params, cache, tokens = example(name, "float32")
    g = intervene(f, some_edits(name, look(f, params, cache, tokens).cells))
    report = check_contract(g, params, cache, vocab_size=32)
    assert report.lawful, report


@programs
def test_edits_that_change_nothing_change_no_bit(name):
    f, params, cache, tokens = example(name, "float32")
    seen = trace(f, params, cache, tokens)
    last = len(seen.cells) - 1
    own = jax.tree.map(lambda x: x[jnp.array([2, 5])], seen.cells[last])
    g = intervene(f, [patch(last, [2, 5], own), scale(0, None, 1.0, of="read"), scale(0, 3, 1.0)])
    pairs = zip(*(jax.tree.leaves(run(h, params, cache, tokens)) for h in (f, g)), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)


def test_a_loop_is_edited_as_it_is_written_out(look):
    with jax.enable_x64(True):
        found = []
        for name in ("looped", "looped_scan"):
            f, params, cache, tokens = example(name)
            cells = look(f, params, cache, tokens).cells
            seen = look(intervene(f, some_edits(name, cells)), params, cache, tokens)
            found.append((seen.cells, seen.queries, seen.reads, seen.logits))
        for x, y in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-11)  # float64, compiled otherwise


@programs
def test_a_contribution_is_the_slope_of_scaling_a_cell(name):
    """Through whatever the memory is: a function of one's own, a sum, a nonlinear recurrence."""
    with jax.enable_x64(True):
        f, params, cache, tokens = example(name)
        toward, t, s = jnp.cos(jnp.arange(32.0)), 6, 5

        def read(factor):
            seen = trace(intervene(f, [scale(0, s, factor)]), params, cache, tokens)
            return seen.reads[0][t] @ toward, contributions(seen, 0, t, toward)

        slope, found = jax.jit(jax.grad(read, has_aux=True))(1.0)
        assert found.shape == (T,) and not found[t + 1 :].any() and found[s] != 0
        np.testing.assert_allclose(found[s], slope, atol=1e-12)  # float64


def test_the_reads_of_a_block_are_told_apart():
    """What is read again is another thing than what was read first, to every function."""
    with jax.enable_x64(True):
        f, params, cache, tokens = example("shared_keys")
        seen = jax.eval_shape(lambda: trace(f, params, cache, tokens))
        order = [(x.block, x.read) for x in seen.instructions]
        assert order == [(0, 0), (0, 1), (1, 0), (1, 1)]
        number = lambda logits: logits[-1, 3]
        for of in ("read", "query"):

            def scaled(factors, of=of):
                edits = [
                    scale(block, 4, factor, of=of, read=read)
                    for (block, read), factor in zip(order, factors, strict=True)
                ]
                return number(run(intervene(f, edits), params, cache, tokens)[1])

            both = lambda of=of: (
                attribution(f, params, cache, tokens, number, of=of),
                jax.grad(scaled)(jnp.ones(4)),
            )
            found, slopes = jax.jit(both)()
            assert found.shape == (4, T)
            np.testing.assert_allclose(found[:, 4], slopes, atol=1e-12)  # float64


def test_what_is_not_there_is_nothing(look):
    """A token shift has no queries, and a cell may hold whole numbers: they add nothing."""
    f, params, cache, tokens = example("token_shift", "float32")
    go = jax.jit(lambda of: attribution(f, params, cache, tokens, jnp.sum, of=of), static_argnums=0)
    assert not go("query").any() and go("cell").any()

    def numbered(params, cache, token, i):
        cell = {"x": params[token], "token": token}
        turn, z = cache.begin(i).write_read(Cells(total), cell, None)
        return turn.end(), z

    cell = {"x": jax.ShapeDtypeStruct((4,), "float32"), "token": jax.ShapeDtypeStruct((), "int32")}
    params, cache = jnp.cos(jnp.arange(32.0)).reshape(8, 4), Cache.empty(8, [(Cells(total), cell)])
    found = attribution(numbered, params, cache, np.arange(5), lambda logits: logits[-1].sum())
    np.testing.assert_allclose(found[0], params[:5].sum(1), atol=1e-6)  # float32 sums of four
    seen = look(numbered, params, cache, np.arange(5))
    found = contributions(seen, 0, 4, jnp.ones(4))
    np.testing.assert_allclose(found, params[:5].sum(1), atol=1e-6)


def total(query, cells, visible, shared):
    return jnp.where(visible[:, None], cells["x"], 0).sum(0)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("linear_attention", lambda: cut(0, [4], [2]), "no cells that some queries could see"),
        ("recurrent", lambda: cut(0, None, 2), "no cells that .* or change the cell itself"),
        ("token_shift", lambda: cut(0, 4, 3, heads=[0]), "has no heads that are known"),
        ("token_shift", lambda: scale(0, 1, 2.0, of="query"), "a query of block 0, which has none"),
        ("looped_scan", lambda: cut(3, 0, 0), "block 3; the cache has the blocks 0 to 2"),
        ("looped", lambda: scale(0, 1, 2.0, read=0), "of a cell, which is the same in every read"),
        ("shared_keys", lambda: cut(1, 4, 3, read=2), "read=2 of block 1, which is read 2 times"),
    ],
)
def test_an_edit_that_cannot_be_right_is_refused(name, make, message):
    f, params, cache, tokens = example(name, "float32")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: run(intervene(f, [make()]), params, cache, tokens))


def test_a_stream_is_of_models_only():
    """What lies between the instructions of a program of one's own is not known."""
    f, params, cache, tokens = example("token_shift", "float32")
    seen = jax.eval_shape(lambda: trace(f, params, cache, tokens))
    for look in (stream, lens, hooks):
        with pytest.raises(TypeError, match=r"was not made by program\(config\)"):
            look(f, params, seen)


def test_one_read_of_several_is_cut(look):
    """In every schedule, and the other read of the block sees what it saw."""
    with jax.enable_x64(True):
        f, params, cache, tokens = example("shared_keys")
        g = intervene(f, [cut(1, 7, [2, 3], read=1), scale(0, 5, 0.0, of="read", read=1)])
        seen, plain = (look(h, params, cache, tokens) for h in (g, f))
        same = lambda n, t: np.allclose(seen.instructions[n].z[t], plain.instructions[n].z[t])
        assert same(0, 5) and not same(1, 5) and not seen.instructions[1].z[5].any()
        assert same(2, slice(0, 5)) and not same(3, 7)
        for chunk in (1, 4):
            logits = jax.jit(lambda chunk=chunk: run(g, params, cache, tokens, chunk=chunk)[1])()
            np.testing.assert_allclose(logits, seen.logits, atol=1e-10)  # float64, another order
