"""Unlawful programs are refused, with the rule and the line; lawful ones, however odd, are not.

In each unlawful program the line that breaks the rule bears the comment `# unlawful`.
"""

import contextlib
import inspect
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap, sequential_vmap
from jax.experimental import io_callback, pallas
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from kernels.tracing import primitive
from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.fold import Fold
from transformer.memory.instruction import Operands, read
from transformer.memory.memory import Memory
from transformer.memory.rules import Rule
from transformer.memory.softmax import Softmax
from transformer.modes.contract import static
from transformer.modes.contract.findings import Findings
from transformer.numerics.numerics import EXACT
from transformer.presets import presets
from transformer.program.init import init_cache, init_params
from transformer.program.program import program

V, E, LAYERS = 11, 8, 2


def attend(query, cells, visible, shared):
    keys, values = cells
    return jax.nn.softmax(jnp.where(visible, keys @ query, -1e30)) @ values


ATTENTION = Cells(attend)
CACHE = Cache.empty(16, [(ATTENTION, ((E,), (E,)))] * LAYERS)
ONE = Cache.empty(16, [(ATTENTION, ((E,), (E,)))])
STACKED = Cache.empty(16, [(ATTENTION, ((E,), (E,)))], repeats=3)
OTHER = Cache.empty(16, [(ATTENTION, ((E,), (E,)))] * LAYERS)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


PARAMS = {"embedding": normal(0, V, E), "layers": [normal(1 + n, E, E) for n in range(3)]}


def begin(params, cache, token, i):
    return cache.begin(i), params["embedding"][token]


def end(params, turn, x):
    return turn.end(), x @ params["embedding"].T


def layer(turn, x, w):
    turn, z = turn.write_read(ATTENTION, (x @ w, x), x)
    return turn, x + jnp.tanh(z)


def layers(params, turn, x):
    for w in params["layers"][:LAYERS]:
        turn, x = layer(turn, x, w)
    return turn, x


def plain(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, x))


def check(f, params=PARAMS, cache=CACHE, vocab_size=V):
    findings = Findings()
    static.check(f, params, cache, vocab_size, findings)
    return findings.report()


# Blocks, and when they are written.


def reads_the_last_block_early(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + turn.read(LAYERS - 1, ATTENTION, x)  # unlawful
    return end(params, *layers(params, turn, x))


def reads_the_arrays_early(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    keys, values = cache._blocks[-1]
    x = x + jax.nn.softmax(keys @ x) @ values  # unlawful
    return end(params, *layers(params, turn, x))


def reads_early_by_the_primitive(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    block = cache._blocks[1]
    operands = Operands((block, block), None, turn.i, (x, x), x, None)
    x = x + read(ATTENTION, operands, None)  # unlawful
    return end(params, *layers(params, turn, x))


def reads_with_another_cell(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    arrays = cache._blocks[0], turn._cache._blocks[0]
    operands = Operands(arrays, None, turn.i, (x, x), x, None)
    return end(params, turn, x + read(ATTENTION, operands, None))  # unlawful


def reads_a_later_cell(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    z = turn.replace(i=i + 1).read(0, ATTENTION, x)  # unlawful
    return end(params, turn, x + z)


def one_block_in_a_loop(params, cache, token, i):
    def body(carry, w):
        cache, x = carry
        turn, x = layer(cache.begin(i), x, w)
        return (turn.end(), x), None

    x = params["embedding"][token]
    (cache, x), _ = jax.lax.scan(body, (cache, x), jnp.stack(params["layers"]))
    return cache, x @ params["embedding"].T


def one_block_in_a_while_loop(params, cache, token, i):
    def body(carry):
        n, cache, x = carry
        turn, x = layer(cache.begin(i), x, params["layers"][0])
        return n + 1, turn.end(), x

    start = 0, cache, params["embedding"][token]
    _, cache, x = jax.lax.while_loop(lambda c: c[0] < 1 + token, body, start)  # unlawful
    return cache, x @ params["embedding"].T


def written_by_two_turns(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    turn = turn.end().begin(i)
    for w in params["layers"][:LAYERS]:
        turn, x = layer(turn, x, w)
    return end(params, turn, x)


def written_by_a_turn_that_is_dropped(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    _, x = layer(turn, x, params["layers"][2])
    return end(params, *layers(params, turn, x))


def written_thrice(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    turn, x = layer(turn, x, params["layers"][2])
    return end(params, turn, x)


def written_not_at_all(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    turn, x = layer(turn, x, params["layers"][0])
    return end(params, turn, x)


def left_as_it_was(params, cache, token, i):  # unlawful
    _, logits = plain(params, cache, token, i)
    return cache, logits


def out_of_order(params, cache, token, i):
    turn, x = begin(params, cache.replace(_blocks=cache._blocks[::-1]), token, i)
    turn, x = layer(turn, x, params["layers"][0])
    turn, x = layer(turn, x, params["layers"][1])
    cache = turn.end()
    return cache.replace(_blocks=cache._blocks[::-1]), x @ params["embedding"].T


def swapped_in_the_end(params, cache, token, i):  # unlawful
    cache, logits = plain(params, cache, token, i)
    return cache.replace(_blocks=cache._blocks[::-1]), logits


def written_if_the_token_says_so(params, cache, token, i):
    def some(cache):
        return plain(params, cache, token, i)

    def other(cache):
        turn, x = begin(params, cache, token, i)
        for w in params["layers"][1:]:
            turn, x = layer(turn, x, w)
        return end(params, turn, x)

    return jax.lax.cond(token > 3, some, other, cache)  # unlawful


# The arrays of blocks.


def sums_the_leaves(params, cache, token, i):
    cache, logits = plain(params, cache, token, i)
    return cache, logits + sum(x.mean() for x in jax.tree.leaves(cache))  # unlawful


def scatters(params, cache, token, i):
    cache, logits = plain(params, cache, token, i)
    keys, values = cache._blocks[0]
    keys = keys.at[i].set(logits[:E])  # unlawful
    return cache.replace(_blocks=((keys, values), *cache._blocks[1:])), logits


def copies_the_block_first(params, cache, token, i):
    cache = jax.tree.map(lambda x: x * 1, cache)  # unlawful
    return plain(params, cache, token, i)


def hides_in_jit(params, cache, token, i):
    cache, logits = plain(params, cache, token, i)
    return cache, logits + jax.jit(lambda c: c._blocks[0][0].mean())(cache)  # unlawful


def hides_in_jnp(params, cache, token, i):
    cache, logits = plain(params, cache, token, i)
    return cache, logits + jnp.linalg.norm(cache._blocks[0][0])  # unlawful


def hides_in_remat(params, cache, token, i):
    @jax.checkpoint
    def inner(cache, x):
        return x + cache._blocks[1][0].mean()  # unlawful

    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, inner(cache, x)))


def hides_in_a_loop(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = jax.lax.fori_loop(0, 3, lambda n, x: x + cache._blocks[0][0][n], x)  # unlawful
    return end(params, *layers(params, turn, x))


def hides_in_scanned_slices(params, cache, token, i):
    cache, logits = plain(params, cache, token, i)
    step = lambda total, key: (total + key.sum(), None)
    return cache, logits + jax.lax.scan(step, 0.0, cache._blocks[0][0])[0]  # unlawful


def hides_in_a_custom_jvp(params, cache, token, i):
    @jax.custom_jvp
    def leak(cache):
        return 0.0

    leak.defjvp(lambda primals, tangents: (primals[0]._blocks[0][0].sum(), 0.0))
    cache, logits = plain(params, cache, token, i)
    return cache, logits + leak(cache)  # unlawful


def hides_in_a_mutable_array(params, cache, token, i):
    cache, logits = plain(params, cache, token, i)
    kept = jax.new_ref(cache._blocks[0][0])  # unlawful
    return cache, logits + kept[...].mean()


def returns_a_block_as_logits(params, cache, token, i):
    cache, _ = plain(params, cache, token, i)
    return cache, cache._blocks[0][0][:V, 0]  # unlawful


def differentiates_the_instruction(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + jax.grad(lambda x: turn.write_read(ATTENTION, (x, x), x)[1].sum())(x)  # unlawful
    return end(params, *layers(params, turn, x))


def calls_the_memory_itself(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    _, z = ATTENTION.step(cache._blocks[0], i, (x, x), x, None)  # unlawful
    return end(params, *layers(params, turn, x + z))


# The position.


def next_cell(params, cache, token, i):
    turn, x = begin(params, cache, token, i + 1)
    return end(params, *layers(params, turn, x))


def fixed_cell(params, cache, token, i):
    turn, x = begin(params, cache, token, 0)
    return end(params, *layers(params, turn, x))


def cell_of_the_token(params, cache, token, i):
    turn, x = begin(params, cache, token, token)
    return end(params, *layers(params, turn, x))


def no_padding(params, cache, token, i):
    turn, x = begin(params, cache, token, jnp.maximum(i, 0))
    return end(params, *layers(params, turn, x))


def chosen_cell(params, cache, token, i):
    i = jax.lax.cond(token > 3, lambda: i, lambda: i - 1)
    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, x))


def narrow_cell(params, cache, token, i):
    turn, x = begin(params, cache, token, i.astype(jnp.int8))
    return end(params, *layers(params, turn, x))


def turns_chosen_by_a_condition(params, cache, token, i):
    begin = lambda i: lambda cache: plain(params, cache, token, i)
    return jax.lax.cond(params["layers"][0][0, 0] > 0, begin(i), begin(i - 1), cache)


# State elsewhere.

PAST, COUNT, ARRAY = [], {"calls": 0}, np.zeros(E, np.float32)
REF = jax.new_ref(jnp.zeros(E))


def list_as_state(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    PAST.append(x)  # unlawful
    x = x + sum(PAST)
    return end(params, *layers(params, turn, x))


def list_as_state_in_jit(params, cache, token, i):
    @jax.jit
    def inner(x):
        PAST.append(x)  # unlawful
        return x

    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, inner(x)))


def counts_its_calls(params, cache, token, i):
    COUNT["calls"] += 1  # unlawful
    cache, logits = plain(params, cache, token, i)
    return cache, logits * COUNT["calls"]


def changes_a_numpy_array(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + ARRAY  # unlawful
    ARRAY[:] += 1
    return end(params, *layers(params, turn, x))


class Stateful:
    """A program that is an object."""

    def __init__(self):
        self.past = None

    def __call__(self, params, cache, token, i):
        turn, x = begin(params, cache, token, i)
        self.past = x  # unlawful
        return end(params, *layers(params, turn, x))


def draws_while_it_is_traced(params, cache, token, i):
    noise = np.random.default_rng(None).normal()
    cache, logits = plain(params, cache, token, i)
    return cache, logits * noise  # unlawful


def calls_back(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = io_callback(lambda x: x, x, x)  # unlawful
    return end(params, *layers(params, turn, x))


def calls_back_purely(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = jax.pure_callback(lambda x: x, x, x, vmap_method="sequential")  # unlawful
    return end(params, *layers(params, turn, x))


def calls_back_to_debug(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    jax.debug.callback(lambda x: None, x)  # unlawful
    return end(params, *layers(params, turn, x))


def keeps_a_mutable_array(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    REF[...] += x  # unlawful
    return end(params, *layers(params, turn, x + REF[...]))


def writes_another_cache(params, cache, token, i):
    turn, x = begin(params, OTHER, token, i)
    turn, x = layer(turn, x, params["layers"][0])
    return end(params, *layers(params, cache.begin(i), x))


def reads_another_cache(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + OTHER._blocks[0][0][0]  # unlawful
    return end(params, *layers(params, turn, x))


def reads_the_same_cache_from_outside(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + np.asarray(CACHE._blocks[1][0])[3]  # unlawful
    return end(params, *layers(params, turn, x))


# Other tokens.


def mean_over_positions(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x - jax.lax.pmean(x, "positions")  # unlawful
    return end(params, *layers(params, turn, x))


def mean_where_there_are_positions(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    with contextlib.suppress(NameError):
        x = x - jax.lax.pmean(x, ("positions",))  # unlawful
    return end(params, *layers(params, turn, x))


def expert_choice(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    scores = jax.lax.all_gather(x[0], "positions")  # unlawful
    x = jnp.where(x[0] >= jax.lax.top_k(scores, 1)[0][-1], jnp.tanh(x), x)
    return end(params, *layers(params, turn, x))


def place_in_the_chunk(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + jax.lax.axis_index("positions")  # unlawful
    return end(params, *layers(params, turn, x))


def value_of_the_neighbour(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x + jax.lax.ppermute(x, "positions", [(0, 1)])  # unlawful
    return end(params, *layers(params, turn, x))


def size_of_the_chunk(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    x = x * jax.lax.psum(1, "positions")  # unlawful
    return end(params, *layers(params, turn, x))


def shares_what_differs(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    for w in params["layers"][:LAYERS]:
        turn, x = turn.write_read(ATTENTION, (x @ w, x), x, x)  # unlawful
    return end(params, turn, x)


def looks_at_its_tracers(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    if "Batch" in type(token).__name__:
        x = jnp.tanh(x)  # unlawful
    return end(params, *layers(params, turn, x))


# What hides from the analysis.


@custom_vmap
def centred(x):
    return x


@centred.def_vmap
def _(size, mapped, x):
    return x - x.mean(0), True


def maps_by_a_rule_of_its_own(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, centred(x)))  # unlawful


mixed_p = Primitive("mixed")
mixed_p.def_impl(lambda x: x)
mixed_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(mixed_p, lambda ctx, x: [x])
batching.primitive_batchers[mixed_p] = lambda xs, dims: (jnp.cumsum(xs[0], dims[0]), dims[0])


def has_a_primitive_of_its_own(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, mixed_p.bind(x)))  # unlawful


mixed_by_our_helper_p = primitive.define(
    "experts", lambda x: [x], lambda axis, xs, dims: ([jnp.cumsum(xs[0], dims[0])], dims)
)


def has_a_primitive_named_as_ours(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    [x] = mixed_by_our_helper_p.bind(x)  # unlawful
    return end(params, *layers(params, turn, x))


@jax.custom_jvp
def rule_over_positions(x):
    return x


@rule_over_positions.defjvp
def _(primals, tangents):
    return jax.lax.pmean(primals[0], "positions"), tangents[0]  # unlawful: in training


def differentiates_over_positions(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, rule_over_positions(x)))


@jax.custom_vjp
def backward_over_positions(x):
    return x


backward_over_positions.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.pmean(g, "positions"),))


def sends_gradients_over_positions(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    return end(params, *layers(params, turn, backward_over_positions(x)))


def packs_by_itself(params, cache, token, i):
    turn, x = begin(params, cache.replace(packed=True), token, i)
    turn, x = layer(turn, x, params["layers"][0])
    turn, x = layer(turn, x, params["layers"][1])
    cache = turn.end()
    return cache.replace(packed=False), x @ params["embedding"].T


def maps_positions_inside(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    twice = jax.vmap(
        lambda x, i: turn.replace(i=i).write_read(ATTENTION, (x, x), x)[1],  # unlawful
        axis_name="positions",
    )
    x = x + twice(jnp.stack([x, x]), jnp.stack([i, i])).mean(0)
    return end(params, *layers(params, turn, x))


# Memories.


@dataclass(frozen=True)
class Told(Memory):
    """A running sum that tells Python."""

    def empty(self, capacity, cell):
        return jnp.zeros(cell.shape, cell.dtype)

    def step(self, block, i, cell, query, shared):
        block = jnp.where(i == 0, 0, block) + cell
        return block, io_callback(lambda x: x, block, block)  # unlawful


@dataclass(frozen=True)
class Remembered(Told):
    """A running sum that is also kept elsewhere."""

    def step(self, block, i, cell, query, shared):
        PAST.append(cell)  # unlawful
        block = jnp.where(i == 0, 0, block) + cell
        return block, block


def by_memory(memory, cell=lambda x: x):
    def f(params, cache, token, i):
        turn, x = begin(params, cache, token, i)
        for _ in range(LAYERS):
            turn, z = turn.write_read(memory, cell(x), x)
            x = x + z
        return end(params, turn, x)

    return f, Cache.empty(16, [(memory, (E,))] * LAYERS)


def rule_in_a_read(query, cells, visible, shared):
    return centred(query) + cells[0]  # unlawful


# Scanned layers.


def scanned(body):
    def f(params, cache, token, i):
        turn, x = begin(params, cache, token, i)
        turn, x = turn.scan(body, x, jnp.stack(params["layers"]))
        return end(params, turn, x)

    return f


def repeat_reads_blocks(turn, x, w):
    x = x + turn._cache._blocks[0][0].mean()  # unlawful
    return layer(turn, x, w)


def repeat_of_another_layer(turn, x, w):
    return layer(turn.replace(_layer=turn._layer + 1), x, w)


def some_repeats(params, cache, token, i):
    x = params["embedding"][token]

    def body(carry, inputs):
        blocks, x = carry
        n, w = inputs
        turn = cache.replace(_blocks=blocks).begin(i).replace(_layer=n)
        turn, x = layer(turn, x, w)
        return (turn._cache._blocks, x), None

    inputs = jnp.arange(2), jnp.stack(params["layers"][:2])
    (blocks, x), _ = jax.lax.scan(body, (cache._blocks, x), inputs)  # unlawful
    return cache.replace(_blocks=blocks), x @ params["embedding"].T


def repeats_backwards(params, cache, token, i):
    x = params["embedding"][token]

    def body(carry, inputs):
        blocks, x = carry
        n, w = inputs
        turn, x = layer(cache.replace(_blocks=blocks).begin(i).replace(_layer=n), x, w)
        return (turn._cache._blocks, x), None

    inputs = jnp.arange(3), jnp.stack(params["layers"])
    (blocks, x), _ = jax.lax.scan(body, (cache._blocks, x), inputs, reverse=True)  # unlawful
    return cache.replace(_blocks=blocks), x @ params["embedding"].T


def repeats_that_forget(params, cache, token, i):
    """Each repeat starts from the stack as it was before the first one."""
    x = params["embedding"][token]

    def body(carry, inputs):
        first, _, x = carry
        n, w = inputs
        turn, x = layer(cache.replace(_blocks=first).begin(i).replace(_layer=n), x, w)
        return (first, turn._cache._blocks, x), None

    inputs = jnp.arange(3), jnp.stack(params["layers"])
    start = cache._blocks, cache._blocks, x
    (_, blocks, x), _ = jax.lax.scan(body, start, inputs)
    return cache.replace(_blocks=blocks), x @ params["embedding"].T


# The rest.


def no_cache(params, cache, token, i):  # unlawful
    return plain(params, cache, token, i)[1]


def a_turn_for_a_cache(params, cache, token, i):  # unlawful
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    return turn, x @ params["embedding"].T


def another_capacity(params, cache, token, i):  # unlawful
    cache, logits = plain(params, cache, token, i)
    return cache.replace(capacity=99), logits


def few_logits(params, cache, token, i):  # unlawful
    cache, logits = plain(params, cache, token, i)
    return cache, logits[:3]


def branches_on_a_value(params, cache, token, i):
    if token > 3:  # unlawful
        token = token - 1
    return plain(params, cache, token, i)


UNLAWFUL = [
    (reads_the_last_block_early, Rule.WRITTEN, 1),
    (reads_the_arrays_early, Rule.PRIVATE, 1),
    (reads_early_by_the_primitive, Rule.WRITTEN, 1),
    (reads_with_another_cell, Rule.WRITTEN, 0),
    (reads_a_later_cell, Rule.OWN, 0),
    (written_by_two_turns, Rule.ONCE, 0),
    (written_by_a_turn_that_is_dropped, Rule.ONCE, 0),
    (written_thrice, Rule.ONCE, None),
    (written_not_at_all, Rule.ONCE, 1),
    (left_as_it_was, Rule.PRIVATE, 0),
    (out_of_order, Rule.ONCE, 1),
    (swapped_in_the_end, Rule.PRIVATE, 0),
    (written_if_the_token_says_so, Rule.ONCE, None),
    (sums_the_leaves, Rule.PRIVATE, 0),
    (scatters, Rule.PRIVATE, 0),
    (copies_the_block_first, Rule.PRIVATE, 0),
    (hides_in_jit, Rule.PRIVATE, 0),
    (hides_in_jnp, Rule.PRIVATE, 0),
    (hides_in_remat, Rule.PRIVATE, 1),
    (hides_in_a_loop, Rule.PRIVATE, 0),
    (hides_in_scanned_slices, Rule.PRIVATE, 0),
    (hides_in_a_custom_jvp, Rule.PROVABLE, None),
    (hides_in_a_mutable_array, Rule.PRIVATE, 0),
    (returns_a_block_as_logits, Rule.PRIVATE, 0),
    (differentiates_the_instruction, Rule.PRIVATE, 0),
    (calls_the_memory_itself, Rule.PRIVATE, 0),
    (next_cell, Rule.OWN, 0),
    (fixed_cell, Rule.OWN, 0),
    (cell_of_the_token, Rule.OWN, 0),
    (no_padding, Rule.OWN, 0),
    (chosen_cell, Rule.OWN, 0),
    (narrow_cell, Rule.OWN, 0),
    (turns_chosen_by_a_condition, Rule.OWN, 0),
    (list_as_state, Rule.STATE, None),
    (list_as_state_in_jit, Rule.STATE, None),
    (counts_its_calls, Rule.STATE, None),
    (changes_a_numpy_array, Rule.STATE, None),
    (Stateful(), Rule.STATE, None),
    (draws_while_it_is_traced, Rule.STATE, None),
    (calls_back, Rule.STATE, None),
    (calls_back_purely, Rule.STATE, None),
    (calls_back_to_debug, Rule.STATE, None),
    (keeps_a_mutable_array, Rule.STATE, None),
    (writes_another_cache, Rule.PRIVATE, 0),
    (reads_another_cache, Rule.PRIVATE, None),
    (reads_the_same_cache_from_outside, Rule.PRIVATE, None),
    (mean_over_positions, Rule.APART, None),
    (mean_where_there_are_positions, Rule.APART, None),
    (expert_choice, Rule.APART, None),
    (place_in_the_chunk, Rule.APART, None),
    (value_of_the_neighbour, Rule.APART, None),
    (size_of_the_chunk, Rule.APART, None),
    (shares_what_differs, Rule.APART, 0),
    (looks_at_its_tracers, Rule.APART, None),
    (maps_by_a_rule_of_its_own, Rule.PROVABLE, None),
    (has_a_primitive_of_its_own, Rule.PROVABLE, None),
    (has_a_primitive_named_as_ours, Rule.PROVABLE, None),
    (differentiates_over_positions, Rule.APART, None),
    (sends_gradients_over_positions, Rule.APART, None),
    (packs_by_itself, Rule.PROVABLE, 0),
    (maps_positions_inside, Rule.PROVABLE, 0),
    (no_cache, Rule.RUNS, None),
    (a_turn_for_a_cache, Rule.ONCE, None),
    (another_capacity, Rule.PRIVATE, None),
    (few_logits, Rule.RUNS, None),
    (branches_on_a_value, Rule.RUNS, None),
]
UNLAWFUL = [(f, CACHE, rule, block, f) for f, rule, block in UNLAWFUL]
UNLAWFUL += [
    (one_block_in_a_loop, ONE, Rule.ONCE, None, one_block_in_a_loop),
    (one_block_in_a_while_loop, ONE, Rule.ONCE, None, one_block_in_a_while_loop),
    (*by_memory(Told()), Rule.STATE, None, Told),
    (*by_memory(Remembered()), Rule.STATE, None, Remembered),
    (*by_memory(Cells(rule_in_a_read)), Rule.PROVABLE, None, rule_in_a_read),
    (scanned(repeat_reads_blocks), STACKED, Rule.PRIVATE, 0, repeat_reads_blocks),
    (scanned(repeat_of_another_layer), STACKED, Rule.ONCE, 0, repeat_of_another_layer),
    (some_repeats, STACKED, Rule.ONCE, None, some_repeats),
    (repeats_backwards, STACKED, Rule.ONCE, None, repeats_backwards),
    (repeats_that_forget, STACKED, Rule.PRIVATE, 0, repeats_that_forget),
]


def marked_lines(code):
    """The places in a function or a class that bear the comment, and where it begins and ends."""
    code = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    lines, first = inspect.getsourcelines(code)
    marked = [first + n for n, line in enumerate(lines) if "# unlawful" in line]
    return [f"{__file__}:{n}" for n in marked]


@pytest.mark.parametrize(
    ("f", "cache", "rule", "block", "code"),
    [pytest.param(*case, id=getattr(case[-1], "__name__", "object")) for case in UNLAWFUL],
)
def test_unlawful_programs_are_refused(f, cache, rule, block, code):
    PAST.clear()
    report = check(f, cache=cache)
    assert not report.lawful
    found = [(v.rule, v.block) for v in report.violations]
    assert (rule, block) in found, report
    places = [v.where for v in report.violations]
    assert all(place.startswith(f"{__file__}:") for place in places), report
    assert not (marked := marked_lines(code)) or set(marked) & set(places), report
    assert all(len(line) <= 80 for line in str(report).splitlines())


# Lawful programs: whatever is done between the instructions is free.


def between(function):
    """A program that computes something between its instructions."""

    def f(params, cache, token, i):
        turn, x = begin(params, cache, token, i)
        for w in params["layers"][:LAYERS]:
            turn, x = layer(turn, function(params, x, i), w)
        return end(params, turn, x)

    return f


def heads(x):
    return x.reshape(2, -1)


def normalized_over_heads(params, x, i):
    over = jax.vmap(lambda h: h - jax.lax.pmean(h, "heads"), axis_name="heads")
    return over(heads(x)).reshape(-1)


def chosen_by_params(params, x, i):
    return jax.lax.cond(params["layers"][0][0, 0] > 0, jnp.tanh, jnp.sin, x)


def chosen_by_the_token(params, x, i):
    return jax.lax.cond(x[0] > 0, jnp.tanh, jnp.sin, x)


def scanned_experts(params, x, i):
    step = lambda total, w: (total + jnp.tanh(x @ w), None)
    return jax.lax.scan(step, x, jnp.stack(params["layers"]))[0]


def dropped_out(params, x, i):
    key = jax.random.fold_in(jax.random.key(3), i)
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0)


def first_is_special(params, x, i):
    return jnp.where(i == 0, 0, x) + jnp.sin(i.astype(jnp.float32))


def as_often_as_it_takes(params, x, i):
    return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x / 2, x)


def counted_in_a_mutable_array(params, x, i):
    total = jax.new_ref(jnp.zeros_like(x))
    for w in params["layers"]:
        total[...] += jnp.tanh(x @ w)
    return x + total[...]


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


@clipped.defjvp
def _(primals, tangents):
    return clipped(*primals), tangents[0]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def mapped_one_by_one(params, x, i):
    return sequential_vmap(jnp.tanh)(x)


def multiplied_in_a_kernel(params, x, i):
    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(x)


def printed(params, x, i):
    jax.debug.print("{}", x)
    return x


def inverted(params, x, i):
    return jnp.linalg.solve(jnp.eye(E) + 0.1 * params["layers"][0], x)


@jax.jit
def compiled(params, cache, token, i):
    return plain(params, cache, token, i)


def recomputed(params, cache, token, i):
    return jax.checkpoint(plain)(params, cache, token, i)


def recomputed_by_layer(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    for w in params["layers"][:LAYERS]:
        turn, x = jax.checkpoint(layer)(turn, x, w)
    return end(params, turn, x)


def layer_chosen_by_params(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    for n in range(LAYERS):
        first = params["layers"][n][0, 0] > 0
        run = [partial(layer, w=w) for w in params["layers"][:2]]
        turn, x = jax.lax.cond(first, *run, turn, x)
    return end(params, turn, x)


def heads_with_blocks_of_their_own(params, cache, token, i):
    """One block that is mapped over its first axis: to each head it is a block."""
    turn, x = begin(params, cache, token, i)

    def head(blocks, h):
        own = turn.replace(_cache=cache.replace(_blocks=blocks))
        own, z = own.write_read(ATTENTION, (h, h), h)
        return own._cache._blocks, z

    blocks, z = jax.vmap(head)(cache._blocks, heads(x))
    return cache.replace(_blocks=blocks), (x + z.reshape(-1)) @ params["embedding"].T


def angles_computed_once(params, cache, token, i):
    """Foreign code, but a kernel of ours."""
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    return end(params, turn, x * EXACT.once(jnp.cos(i.astype(jnp.float32))))


def reads_again(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    turn, x = layers(params, turn, x)
    x = x + turn.read(0, ATTENTION, x)
    again = lambda n, x: x + turn.read(1, ATTENTION, x)
    return end(params, turn, jax.lax.fori_loop(0, 3, again, x))


def reads_by_a_memory_made_anew(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    for w in params["layers"][:LAYERS]:
        own = Cells(lambda query, cells, visible, shared: attend(query, cells, visible, shared))
        turn, z = turn.write_read(own, (x @ w, x), x)
        x = x + z
    return end(params, turn, x)


def remembers_its_shapes(params, cache, token, i):
    """What is worked out once, from what never changes, is no state."""
    SHAPES.setdefault("width", params["embedding"].shape[1])
    return plain(params, cache, token, i)


def takes_sinks(params, cache, token, i):
    turn, x = begin(params, cache, token, i)
    query, key = heads(x), x[None, : E // 2]
    turn, z = turn.write_read(Softmax(), (key, key), query, params["layers"][0][0, :2])
    turn, z = turn.write_read(Softmax(window=4), (key, key), query + z, None)
    return end(params, turn, x + z.reshape(-1))


SHAPES = {}
K, H = 1, E // 2
SINKS = Cache.empty(16, [(Softmax(), ((K, H), (K, H))), (Softmax(window=4), ((K, H), (K, H)))])
HEADS = Cache(tuple((jnp.zeros((2, 16, E // 2)),) * 2 for _ in range(1)), 16)


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


SUM = Fold(add, lambda query, state, shared: query + state)
SHIFT = Window(
    3, lambda query, cells, visible, shared: jnp.where(visible[:, None], cells, 0).sum(0)
)
PLAIN = [plain, compiled, recomputed, recomputed_by_layer, layer_chosen_by_params, reads_again]
PLAIN += [partial(plain), reads_by_a_memory_made_anew, remembers_its_shapes]
BETWEEN = [
    normalized_over_heads, chosen_by_params, chosen_by_the_token, scanned_experts, dropped_out,
    first_is_special, as_often_as_it_takes, counted_in_a_mutable_array, mapped_one_by_one,
    multiplied_in_a_kernel, printed, inverted,
]  # fmt: skip
BETWEEN += [lambda params, x, i: clipped(x), lambda params, x, i: straight_through(x)]
LAWFUL = [(f, CACHE) for f in [*PLAIN, *map(between, BETWEEN)]]
LAWFUL += [by_memory(SUM), by_memory(SHIFT), (takes_sinks, SINKS), (scanned(layer), STACKED)]
LAWFUL += [(heads_with_blocks_of_their_own, HEADS), (angles_computed_once, CACHE)]


@pytest.mark.parametrize(("f", "cache"), LAWFUL)
def test_lawful_programs_pass(f, cache):
    report = check(f, cache=cache)
    assert report.lawful, report


def test_what_is_printed_is_noted():
    assert "prints" in check(between(printed)).notes[0]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny", {"window": (4, None), "attention_sinks": True}),
        ("tiny", {"scan_layers": True, "remat": "dots"}),
        ("tiny", {"num_experts": 4, "num_shared_kv_layers": 2}),
        ("tiny-hybrid", {}),
        ("tiny-hybrid", {"scan_layers": True, "num_experts": 4}),
        ("tiny-mla", {"remat": "segments"}),
        ("tiny-mla", {"scan_layers": True}),
    ],
    ids=str,
)
def test_every_transformer_is_lawful(preset, changes):
    config = presets[preset].replace(num_layers=4, width=16, vocab_size=V, **changes)
    params, cache = init_params(config, jax.random.key(0)), init_cache(config, 8)
    report = check(program(config), params, cache)
    assert report.lawful, report
