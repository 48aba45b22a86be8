"""Programs under edits: exact, the same in every mode, and never stale."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.data.batches import Batch
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.generate import generate
from transformer.insight import add, cut, edit, intervene, patch, replace, scale, trace
from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.fold import Fold
from transformer.memory.softmax import Softmax
from transformer.modes.contract import check_contract
from transformer.modes.schedule import parallel, run
from transformer.program.init import init_cache
from transformer.training.step import TrainState, make_train_step

MORE = "attention", "latent", "shared", "gpt2"
KINDS = [
    "scanned",
    "window",
    "hybrid",
    *(pytest.param(x, marks=pytest.mark.thorough) for x in MORE),
]


def some_edits(kind):
    """Edits of every sort, in the last block that every kind has as attention."""
    last = {"hybrid": 2}.get(kind, 1)
    edits = [
        cut(last, [4, 7], [1, 2], heads=[0, 2]),
        cut(last, None, 3),
        scale(last, [5], 0.5),
        add(0, 2, 0.1, of="read"),
        edit(last, [6, 8], lambda x: jax.tree.map(jnp.tanh, x), of="query"),
    ]
    return [*edits, cut(1, None, [2])] if kind == "hybrid" else edits


@pytest.mark.parametrize("kind", KINDS)
def test_edits_hold_in_every_mode(kind, model):
    with jax.enable_x64(True):
        f, params, cache, tokens = model(kind, dtype="float64")
        g = intervene(f, some_edits(kind))
        logits = jax.jit(
            lambda f, chunk=None: run(f, params, cache, tokens, chunk=chunk)[1],
            static_argnums=(0, 1),
        )
        one = logits(g)
        assert np.abs(one - logits(f)).max(1)[4:].mean() > 1e-3
        # The same float64 sums in another order, of numbers of a few units.
        np.testing.assert_allclose(one, logits(g, 1), atol=1e-11)
        rows = jax.jit(jax.vmap(lambda tokens: run(g, params, cache, tokens, chunk=5)[1]))
        np.testing.assert_allclose(rows(jnp.stack([tokens, tokens]))[1], one, atol=1e-11)


@pytest.mark.thorough
def test_a_model_under_edits_is_lawful(model):
    f, params, cache, _ = model("scanned")
    report = check_contract(intervene(f, some_edits("scanned")), params, cache, vocab_size=31)
    assert report.lawful, report


def test_a_program_under_edits_is_lawful(small):
    f, params, cache = small
    edits = [cut(0, [4, 7], [1, 2], heads=[1]), scale(0, 5, 0.5), add(1, 2, 0.1, of="read")]
    edits += [cut(1, 6, 3), edit(1, None, jnp.tanh, of="query")]
    report = check_contract(intervene(f, edits), params, cache, vocab_size=8)
    assert report.lawful, report


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_changes_nothing_changes_no_bit(kind, model):
    f, params, cache, tokens = model(kind)
    seen = trace(f, params, cache, tokens)
    at = np.array([2, 5])
    own = jax.tree.map(lambda x: x[at], seen.cells[1])
    edits = [
        patch(1, at, own),
        scale(1, None, 1.0, of="read"),
        edit(0, None, lambda x: x, of="read" if kind == "hybrid" else "query"),
        patch(1, [], jax.tree.map(lambda x: x[:0], own)),
        *([] if kind == "hybrid" else [cut(1, 3, 8), cut(0, [], [0]), cut(0, 1, 0, heads=[])]),
    ]
    expected = run(f, params, cache, tokens)
    after, logits = run(intervene(f, edits), params, cache, tokens)
    assert np.array_equal(logits, expected[1])
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected[0]), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("chunk", [None, 3, 1])
@pytest.mark.parametrize("window", [None, 4])
def test_a_cut_is_a_mask(window, chunk, rng):
    """Against attention written out with an explicit mask, in float64."""
    with jax.enable_x64(True):
        T, N, K, H = 9, 4, 2, 3
        q, k, v = (jnp.asarray(rng.standard_normal((T, n, H))) for n in (N, K, K))
        sinks = jnp.asarray(rng.standard_normal(N))
        memory = Softmax(window=window)

        def f(params, cache, token, i):
            q, k, v = (x[token] for x in params)
            turn, z = cache.begin(i).write_read(memory, (k, v), q, sinks)
            return turn.end(), z.reshape(-1)

        edits = [cut(0, [5, 8], [4, 5], heads=[1, 2]), cut(0, 6, None), cut(0, None, 2)]
        cell = jax.ShapeDtypeStruct((K, H), jnp.float64)
        cache = Cache.empty(T, [(memory, (cell, cell))])
        g = intervene(f, edits)
        z = jax.jit(lambda *x: run(g, x, cache, np.arange(T), chunk=chunk)[1])(q, k, v)

        t, s, n = np.ogrid[:T, :T, :N]
        mask = (s <= t) & (t - s < (window or T)) & (n >= 0)
        mask &= ~(np.isin(t, [5, 8]) & np.isin(s, [4, 5]) & np.isin(n, [1, 2]))
        mask &= (t != 6) & (s != 2)
        scores = np.einsum("tnh,snh->tsn", q, k.repeat(2, 1)) / H**0.5
        weights = np.where(mask, np.exp(scores), 0)
        weights = weights / (weights.sum(1, keepdims=True) + np.exp(sinks))
        expected = np.einsum("tsn,snh->tnh", weights, v.repeat(2, 1)).reshape(T, -1)
        np.testing.assert_allclose(z, expected, atol=1e-12)  # float64, sums of nine terms


def mean(query, cells, visible, shared):
    return jnp.where(visible[:, None], cells, 0).sum(0) / visible.sum()


def total(query, state, shared):
    return state


@pytest.mark.parametrize("chunk", [None, 4, 1])
@pytest.mark.parametrize(
    ("memory", "queries"),
    [(Cells(mean), [4, 6]), (Window(3, mean), [4, 6]), (Fold(jnp.add, total), None)],
    ids=["Cells", "Window", "Fold"],
)
def test_a_cut_of_other_memories(memory, queries, chunk, rng):
    x = np.float32(rng.standard_normal((8, 5)))

    def f(params, cache, token, i):
        turn, z = cache.begin(i).write_read(memory, params[token], None)
        return turn.end(), z

    cache = Cache.empty(8, [(memory, (5,))])
    g = intervene(f, [cut(0, queries, [3, 4])])
    z = jax.jit(lambda x: run(g, x, cache, np.arange(8), chunk=chunk)[1])(x)
    t, s = np.ogrid[:8, :8]
    mask = (s <= t) & (t - s < getattr(memory, "size", 8))
    mask &= ~(np.isin(t, queries or np.arange(8)) & np.isin(s, [3, 4]))
    expected = mask @ x / (1 if queries is None else mask.sum(1, keepdims=True))
    np.testing.assert_allclose(z, expected, atol=1e-5)  # float32 sums of eight terms


@pytest.fixture
def small(rng):
    """A program of one's own with attention and then `Cells`: (program, params, empty cache)."""
    attention, cells = Softmax(), Cells(lambda q, *rest: q * mean(q, *rest))

    def f(params, cache, token, i):
        kv, q = jax.tree.map(lambda x: x[token], (params["kv"], params["q"]))
        turn, z = cache.begin(i).write_read(attention, kv, q)
        x = z.reshape(-1) + params["x"][token]
        turn, z = turn.write_read(cells, x, jnp.cos(x))
        return turn.end(), z

    draw = lambda *shape: jnp.asarray(rng.standard_normal((8, *shape)), jnp.float32)
    kv = draw(1, 4), draw(1, 4)
    params = {"kv": kv, "q": draw(2, 4), "x": draw(8)}
    return f, params, Cache.empty(12, [(attention, ((1, 4), (1, 4))), (cells, (8,))])


def test_a_query_that_sees_nothing_reads_zeros(model, look):
    f, params, cache, tokens = model("attention")
    g = intervene(f, [cut(1, 4, None)])
    assert not np.asarray(look(g, params, cache, tokens).reads[1][4]).any()
    gradient = jax.jit(jax.grad(lambda params: run(g, params, cache, tokens)[1].sum()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(params)))


def test_edits_of_documents_are_about_their_own_positions(model):
    """Packed documents: each is what it is alone."""
    f, params, cache, tokens = model("attention")
    g = intervene(f, [cut(1, 3, 1), scale(0, 2, 0.0)])
    positions = jnp.asarray([0, 1, 2, 3, 4, 5, 0, 1, 2, 3], jnp.int32)
    tokens = jnp.asarray(tokens)
    packed = jax.jit(lambda: parallel(g, params, cache, tokens, positions, packed=True)[1])()
    alone = jax.jit(lambda tokens: run(g, params, cache, tokens)[1])
    alone = [alone(x) for x in (tokens[:6], tokens[6:])]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=2e-4)  # float32, as above


def test_values_of_edits_are_differentiated(model):
    """The derivative by what is added to a cell is that of the cell."""
    f, params, cache, tokens = model("attention")

    @jax.jit
    def logit(more):
        return run(intervene(f, [add(1, 3, more)]), params, cache, tokens)[1][-1, 0]

    k = v = jnp.zeros((2, 4))
    slope = jax.grad(lambda v: logit((k, v)))(v)
    step = jnp.zeros_like(v).at[1, 2].set(1e-2)
    difference = (logit((k, v + step)) - logit((k, v - step))) / 2e-2
    # Central differences of float32 logits of a few units, with steps of 1e-2.
    np.testing.assert_allclose(slope[1, 2], difference, atol=2e-3)
    assert jax.vmap(lambda x: logit((k, v + x)))(jnp.arange(3.0)).shape == (3,)


def test_a_cache_that_was_filled_before_an_edit_is_refused(small):
    f, params, cache = small
    go, tokens = jax.jit(run, static_argnames=("f", "start")), np.arange(10) % 8
    filled, _ = go(f, params, cache, tokens[:6])
    early, late = intervene(f, [scale(0, 3, 2.0)]), intervene(f, [scale(0, 7, 2.0)])
    with pytest.raises(ValueError, match="position 3, and the cache was filled up to 5 without"):
        go(early, params, filled, tokens[6:], start=6)
    with pytest.raises(ValueError, match="without it"):
        early(params, filled, tokens[6], 6)
    # Right: an edit of what comes, and the cache of the same program.
    for g in (early, late):
        whole = go(g, params, cache, tokens)[1]
        begun = filled if g is late else go(g, params, cache, tokens[:6])[0]
        rest = go(g, params, begun, tokens[6:], start=6)[1]
        # float32, sums of ten terms in another order.
        np.testing.assert_allclose(rest, whole[6:], atol=1e-5)
    # Another program went on with it, without the edit.
    begun, _ = go(early, params, cache, tokens[:2])
    begun, _ = go(f, params, begun, tokens[2:6], start=2)
    with pytest.raises(ValueError, match="without it"):
        go(early, params, begun, tokens[6:], start=6)


def test_edits_of_edits_and_attributes_of_the_program(small):
    f, params, cache = small
    f.config, tokens = "a config", np.arange(8)
    go = jax.jit(run, static_argnums=0)
    first, second = scale(0, 1, 2.0), add(0, 1, 0.5)
    both = intervene(intervene(f, [first]), [second])
    assert both.edits == (first, second) and both.config is f.config
    expected = go(intervene(f, [first, second]), params, cache, tokens)[1]
    assert np.array_equal(go(both, params, cache, tokens)[1], expected)


def test_programs_of_ones_own(rng):
    """Instructions inside of jax.jit and jax.checkpoint, and a block read again."""
    memory = Cells(mean)

    @jax.checkpoint
    def second(turn, x):
        return turn.write_read(memory, x, None)

    def f(params, cache, token, i):
        turn, z = jax.jit(lambda turn, x: turn.write_read(memory, x, None))(
            cache.begin(i), params[token]
        )
        turn, y = second(turn, z)
        return turn.end(), z + y + turn.read(1, memory, None)

    x = np.float32(rng.standard_normal((8, 5)))
    cache = Cache.empty(8, [(memory, (5,))] * 2)
    seen = trace(intervene(f, [scale(1, 2, 0.0)]), x, cache, np.arange(8))
    assert [(x.block, x.again) for x in seen.instructions] == [(0, False), (1, False), (1, True)]
    assert not np.asarray(seen.cells[1][2]).any()
    np.testing.assert_allclose(seen.reads[1], seen.instructions[2].z, atol=1e-6)  # the same means


def test_an_instruction_that_cannot_be_seen_is_refused():
    memory = Cells(mean)

    def f(params, cache, token, i):
        write = lambda x: cache.begin(i).write_read(memory, x, None)
        turn, z = jax.lax.cond(token > 3, write, write, params[token])
        return turn.end(), z

    cache = Cache.empty(8, [(memory, (5,))])
    with pytest.raises(NotImplementedError, match="inside of cond, into which"):
        trace(f, np.ones((8, 5), np.float32), cache, np.arange(8))


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        (lambda: [cut(5, 0, 0)], ValueError, "block 5; the cache has the blocks 0 to 2"),
        (lambda: [cut(2, 0, 0, heads=[9])], ValueError, "query heads 0 to 3"),
        (lambda: [cut(1, [3], 0)], ValueError, "no cells that some queries could see"),
        (lambda: [replace(2, 0, np.zeros(3))], ValueError, "one number for all of it"),
        (lambda: [add(2, 0, [1.0, 2.0], of="read")], ValueError, "one number for all of it"),
        (lambda: [edit(2, 0, lambda x: None)], ValueError, "must stay as they are"),
        (lambda: [edit(2, 0, 0.0)], TypeError, "is a function"),
        (lambda: [cut(2, 3, 99)], ValueError, "position 99; the cache has those from 0 to 15"),
        (lambda: [patch(2, [1, 1], np.zeros((2, 4)))], ValueError, "writes each cell once"),
        (lambda: [patch(2, [1, 2], np.zeros((3, 4)))], ValueError, "leading axis of 2"),
        (lambda: [scale(2, 0, 1.0, of="weights")], ValueError, "one of cell, query, read"),
        (lambda: [scale(2, -1, 1.0)], ValueError, "count from 0"),
        (lambda: [scale(2, 0.5, 1.0)], TypeError, "whole numbers"),
        (lambda: ["cut"], TypeError, "made by a function of transformer.insight"),
        (lambda: cut(0, 1, 0), TypeError, "a list of edits"),
    ],
)
def test_what_is_refused(edits, error, message, model):
    f, params, cache, tokens = model("hybrid")
    with pytest.raises(error, match=message):
        run(intervene(f, edits()), params, cache, tokens)


def test_generate_and_training_take_it(model, rng):
    """Every step is under the edits: without reads no token can tell another anything."""
    f, params, _, _ = model("attention", vocab_size=257, num_layers=1)
    alone = intervene(f, [replace(0, None, 0.0, of="read")])
    judge = SimpleNamespace(config=f.config, params=params, tokenizer=byte_tokenizer())
    options = {"max_new_tokens": 4, "temperature": 0, "program": alone}
    texts = generate(judge, [[1, 2, 65], [3, 65]], **options)
    assert texts[0].tokens == texts[1].tokens
    texts = generate(judge, [[1, 2, 65], [3, 65]], **options | {"program": None})
    assert texts[0].tokens != texts[1].tokens
    # Edits of the prompt and of what is drawn, which is what one run of all finds likeliest.
    g = intervene(f, [cut(0, None, 1), scale(0, [2, 4], 0.0), add(0, 5, 1.0, of="read")])
    [drawn] = generate(judge, [[1, 2, 65]], **options | {"program": g})
    tokens = np.array([1, 2, 65, *drawn.tokens])
    logits = jax.jit(lambda: run(g, params, init_cache(f.config, 16), tokens)[1])()
    assert drawn.tokens == logits[2:-1].argmax(-1).tolist()

    tokens = rng.integers(0, 257, (2, 6), dtype=np.int32)
    batch = Batch(tokens, tokens, positions=None, weights=np.ones((2, 6), np.float32))
    optimizer = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = make_train_step(f.config, optimizer, f=alone)
    after, _ = step(jax.tree.map(jnp.copy, state), batch)
    same = jax.tree.map(np.array_equal, after.params.layers[0], params.layers[0])
    assert same.mixer.key.weight and not same.feed_forward.up.weight
