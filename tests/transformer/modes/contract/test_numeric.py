"""What only running shows: memories that break their law, and programs that see their cache."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.fold import Fold
from transformer.memory.memory import Memory
from transformer.modes.contract import check_contract, static
from transformer.modes.contract.findings import Findings
from transformer.modes.contract.numeric import Laws
from transformer.modes.contract.trial import Trial
from transformer.presets import presets
from transformer.program.init import init_cache, init_params
from transformer.program.program import program

V, E = 11, 8
PARAMS = {
    "embedding": jax.random.normal(jax.random.key(0), (V, E)),
    "matrix": jax.random.normal(jax.random.key(1), (E, E)) / E**0.5,
}


def by(memory, change=lambda cache, z: z, cell=lambda x: x):
    """A program of one block, and a cache for it."""

    def f(params, cache, token, i):
        x = jnp.tanh(params["embedding"][token] @ params["matrix"])
        turn, z = cache.begin(i).write_read(memory, cell(x), x)
        x = x + change(cache, z)
        return turn.end(), x @ params["embedding"].T

    shape = jax.eval_shape(cell, jnp.zeros(E))
    return f, Cache.empty(16, [(memory, shape)])


def attend(query, cells, visible, shared):
    return jax.nn.softmax(jnp.where(visible, cells @ query, -1e30)) @ cells


def sees_all(query, cells, visible, shared):
    return jax.nn.softmax(cells @ query) @ cells


def sees_a_little_of_all(query, cells, visible, shared):
    return attend(query, cells, visible, shared) + 1e-6 * cells.sum(0)


def hides_after_the_softmax(query, cells, visible, shared):
    return jnp.where(visible, jax.nn.softmax(cells @ query), 0) @ cells


def averages_over_the_room(query, cells, visible, shared):
    return jnp.where(visible[:, None], cells, 0).mean(0)


def sees_before_the_beginning(query, cells, visible, shared):
    return cells.sum(0)


@dataclass(frozen=True)
class Sum(Memory):
    """A running sum; each subclass gets something wrong."""

    def empty(self, capacity, cell):
        return jnp.zeros(cell.shape, cell.dtype)

    def step(self, block, i, cell, query, shared):
        block = jnp.where(i == 0, 0, block) + cell
        return block, block

    def chunk(self, block, i, cells, queries, shared):
        cells = jnp.where(i[:, None] >= 0, cells, 0)
        states = jnp.where(i[0] == 0, 0, block) + jnp.cumsum(cells, 0)
        block = jnp.where(i[0] >= 0, states[-1], block)
        return block, jnp.where(i[:, None] >= 0, states, 0)


class KeepsWhatWas(Sum):
    def step(self, block, i, cell, query, shared):
        return block + cell, block + cell

    def chunk(self, block, i, cells, queries, shared):
        return self._scan(block, i, cells, queries, shared)


class ForgetsBetweenChunks(Sum):
    def chunk(self, block, i, cells, queries, shared):
        return super().chunk(0 * block, i, cells, queries, shared)


class AnotherStep(Sum):
    def step(self, block, i, cell, query, shared):
        block = jnp.where(i == 0, 0, block) + 1.01 * cell
        return block, block


class CountsPadding(Sum):
    def chunk(self, block, i, cells, queries, shared):
        states = jnp.where(i[0] == 0, 0, block) + jnp.cumsum(cells, 0)
        return states[-1], states


class MixesSequences(Sum):
    def rows(self, block, i, cells, queries, shared):
        block, z = super().rows(block, i, cells, queries, shared)
        return block, z + 1e-3 * z.mean(0)


class AnotherInPlace(Sum):
    def in_place(self, blocks, i, cells, queries, shared):
        arrays, z = super().in_place(blocks, i, cells, queries, shared)
        return arrays, 1.01 * z


class MixesDocuments(Sum):
    def documents(self, capacity, block, i, cells, queries, shared):
        return super().rows(block, i, cells, queries, shared)


@jax.custom_vjp
def doubled_gradient(x):
    return x


doubled_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


class AnotherGradient(Sum):
    def chunk(self, block, i, cells, queries, shared):
        cells = cells if len(i) == 1 else doubled_gradient(cells)
        return super().chunk(block, i, cells, queries, shared)


def subtract(a, b):
    return a - b


def state(query, state, shared):
    return state


# name: (program and cache, the law that it breaks, the test of it)
UNLAWFUL = {
    "sees all": (by(Cells(sees_all)), "causal", "causal"),
    "sees a little of all": (by(Cells(sees_a_little_of_all)), "causal", "causal"),
    "hides after the softmax": (by(Cells(hides_after_the_softmax)), "causal", "causal"),
    "averages over the room": (by(Cells(averages_over_the_room)), "capacity", "capacity"),
    "knows its capacity": (by(Sum(), lambda cache, z: z * cache.capacity), "capacity", "capacity"),
    "sees before the beginning": (
        by(Window(3, sees_before_the_beginning)),
        "unwritten cells",
        "unwritten",
    ),
    "not associative": (by(Fold(subtract, state)), "schedules agree", "steps"),
    "wrong identity": (by(Fold(jnp.add, state, identity=1)), "schedules agree", "chunks"),
    "keeps what was": (by(KeepsWhatWas()), "unwritten cells", "unwritten"),
    "forgets between chunks": (by(ForgetsBetweenChunks()), "schedules agree", "chunks"),
    "another step": (by(AnotherStep()), "schedules agree", "steps"),
    "counts padding": (by(CountsPadding()), "padding", "padding"),
    "mixes sequences": (by(MixesSequences()), "sequences apart", "sequences"),
    "mixes documents": (by(MixesDocuments()), "documents apart", "packed"),
    "another in place": (by(AnotherInPlace()), "schedules agree", "sequential"),
    "another gradient": (by(AnotherGradient()), "schedules agree", "sequential"),
    "nan": (by(Sum(), lambda cache, z: jnp.log(z)), "finite", "finite"),
}


@pytest.mark.parametrize("name", UNLAWFUL)
def test_unlawful_memories_are_refused(name):
    (f, cache), law, test = UNLAWFUL[name]
    findings = Findings()
    once, written = static.check(f, PARAMS, cache, V, findings)
    assert not findings
    laws = Laws(Trial(f, PARAMS, cache, V), once, written, findings)
    if laws.finite():
        getattr(laws, test)()
    report = findings.report()
    assert law in [v.rule for v in report.violations], report
    assert all(v.where.startswith(f"{__file__}:") for v in report.violations)
    assert all(len(line) <= 80 for line in str(report).splitlines())


def test_the_whole_check_names_the_law_and_leaves_the_cache():
    f, cache = by(Cells(sees_a_little_of_all))
    cache = jax.tree.map(lambda x: x + 1, cache)
    before = jax.tree.map(jnp.copy, cache)
    report = check_contract(f, PARAMS, cache, vocab_size=V)
    assert {v.rule for v in report.violations} >= {"causal", "unwritten cells"}
    assert all(map(jnp.array_equal, jax.tree.leaves(before), jax.tree.leaves(cache)))


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


LAWFUL = {
    "attention": by(Cells(attend)),
    "sum": by(Sum()),
    "linear attention": by(
        Fold(add, lambda q, s, _: q @ s["kv"]), cell=lambda x: {"kv": jnp.outer(x, x)}
    ),
    "shift": by(Window(2, lambda q, c, visible, _: jnp.where(visible[:, None], c, 0).sum(0))),
}


# The programs of examples/ have the others, and are held to the contract too.
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.thorough] * (x != "sum")) for x in LAWFUL]
)
def test_lawful_memories_pass(name):
    f, cache = LAWFUL[name]
    report = check_contract(f, PARAMS, cache, vocab_size=V)
    assert report.lawful, report


@pytest.mark.parametrize("room", [1, 3])
def test_little_room_is_enough(room):
    f, cache = LAWFUL["attention"]
    cache = jax.tree.map(lambda x: x[:room], cache.replace(capacity=room))
    report = check_contract(f, PARAMS, cache, vocab_size=V)
    assert report.lawful, report


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        pytest.param(
            "tiny",
            {"num_layers": 1, "num_experts": 4, "window": 4},
            marks=pytest.mark.thorough,
        ),
        ("tiny", {"scan_layers": True, "dtype": "bfloat16"}),
        pytest.param("tiny-mla", {"num_layers": 1}, marks=pytest.mark.thorough),
        pytest.param(
            "tiny-hybrid", {"layer_kinds": ("delta", "attention")}, marks=pytest.mark.thorough
        ),
    ],
    ids=str,
)
def test_transformers_pass(preset, changes):
    config = presets[preset].replace(**{"num_layers": 2, "width": 16, "vocab_size": V} | changes)
    params, cache = init_params(config, jax.random.key(0)), init_cache(config, 16)
    report = check_contract(program(config), params, cache, vocab_size=V)
    assert report.lawful, report


def test_what_cannot_be_differentiated_is_noted():
    def f(params, cache, token, i):
        cache, logits = LAWFUL["sum"][0](params, cache, token, i)
        return cache, jax.lax.while_loop(lambda x: x.max() > 1, lambda x: x / 2, logits)

    report = check_contract(f, PARAMS, LAWFUL["sum"][1], vocab_size=V)
    assert report.lawful, report
    assert any("gradients were not compared" in note for note in report.notes)
