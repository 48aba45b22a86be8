"""The rules of the cache: each block once, in order, and errors that say so while tracing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.memory.cache import Cache, ProgramError
from transformer.memory.cells import Cells, Window
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import parallel, run
from transformer.presets import presets
from transformer.program.init import init_cache, init_params
from transformer.program.program import program

K, N, H = 2, 4, 3  # heads of keys and of queries, and their size
CELL = (jnp.ones((K, H)), jnp.ones((K, H)))
QUERY = jnp.ones((N, H))
MEMORY = Softmax()
BLOCK = (MEMORY, CELL)


def empty(count=3, capacity=8, **options):
    return Cache.empty(capacity, [BLOCK] * count, **options)


def calling(times, end=True):
    """A program that calls the instruction so many times."""

    def f(params, cache, token, i):
        turn = cache.begin(i)
        for _ in range(times):
            turn, _ = turn.write_read(MEMORY, CELL, QUERY)
        return turn.end() if end else turn, jnp.zeros(7)

    return f


def trace(f, cache=None, chunk=None):
    """Runs a program on four tokens, without computing anything."""
    cache = empty() if cache is None else cache
    return jax.eval_shape(lambda: run(f, None, cache, np.arange(4), chunk=chunk))


@pytest.mark.parametrize("chunk", [None, 1])
def test_calling_too_seldom_names_the_block(chunk):
    with pytest.raises(ProgramError, match=r"ended after 2 of 3 blocks.*block 2.*exactly once"):
        trace(calling(2), chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 1])
def test_calling_too_often_names_the_call(chunk):
    with pytest.raises(ProgramError, match=r"called 4 times.*has 3 blocks.*exactly once"):
        trace(calling(4), chunk=chunk)


def one_kept(params, cache, token, i):
    """Ends a turn of a cache of its own, which holds block 1 as it was."""
    after, logits = calling(3)(params, cache, token, i)
    blocks = (after._blocks[0], cache._blocks[1], after._blocks[2])
    return after.replace(_blocks=blocks), logits


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (calling(2, end=False), r"returned a turn at block 2; return turn.end\(\), the cache"),
        (lambda params, cache, *_: (cache, jnp.zeros(9)), r"block 0 is as it was.*exactly once"),
        (one_kept, r"block 1 is as it was.*exactly once"),
        (lambda *_: (None, jnp.zeros(9)), r"returned NoneType where the cache belongs"),
    ],
    ids=["without end", "without a turn", "without one block", "without the cache"],
)
def test_a_token_that_does_not_end_is_refused(f, message, chunk):
    with pytest.raises(ProgramError, match=message):
        trace(f, chunk=chunk)


def written():
    """A turn that has written one of three blocks."""
    return empty().begin(0).write_read(MEMORY, CELL, QUERY)[0]


def test_a_turn_reads_again_only_what_it_has_written():
    for n in (0, 2, -1):
        with pytest.raises(ProgramError, match=rf"read of block {n}, and .* written 0 of 3"):
            empty().begin(0).read(n, MEMORY, QUERY)
    assert jax.eval_shape(lambda: written().read(0, MEMORY, QUERY)).shape == (N, H)
    with pytest.raises(ProgramError, match=r"read of block 1, and .* written 1 of 3"):
        jax.eval_shape(lambda: written().read(1, MEMORY, QUERY))


@pytest.mark.parametrize(
    ("i", "given"),
    [(0.0, "float32 of shape"), (jnp.arange(3), r"shape \(3,\); use jax.vmap"), (True, "bool")],
)
def test_a_turn_begins_at_one_position(i, given):
    with pytest.raises(ValueError, match=f"begins at one position, an integer, and i is .*{given}"):
        empty().begin(i)


@pytest.mark.parametrize(
    "memory, cell",
    [
        (MEMORY, (jnp.ones((K + 1, H)), jnp.ones((K + 1, H)))),
        (MEMORY, (jnp.ones((K, H)), jnp.ones((K, H + 1)))),
        (MEMORY, (jnp.ones((K, H), int), jnp.ones((K, H), int))),
        (Softmax(window=5), CELL),
        (Cells(lambda *_: 0), CELL),
    ],
    ids=["more heads", "larger values", "whole numbers", "a ring", "another memory"],
)
def test_cells_and_memories_that_do_not_fit_the_block_are_refused(memory, cell):
    message = r"block 0 holds \(float32\[2, 8, 3\], float32\[2, 8, 3\]\).*keeps cells.*capacity 8"
    with pytest.raises(ValueError, match=message):
        empty().begin(0).write_read(memory, cell, QUERY)
    if memory is not MEMORY:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: written().read(0, memory, QUERY))


def test_a_query_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=rf"a query of Softmax is \[N, H={H}\].*\[3, 3\]"):
        empty().begin(0).write_read(MEMORY, CELL, jnp.ones((K + 1, H)))


def test_what_is_not_a_memory_is_refused():
    with pytest.raises(TypeError, match=r"take a Memory, and got 'softmax' of type str"):
        empty().begin(0).write_read("softmax", CELL, QUERY)
    for block in (CELL, ("softmax", CELL), MEMORY):
        with pytest.raises(TypeError, match=r"a block is given as \(memory, shapes of its cell\)"):
            Cache.empty(8, [block])


def test_a_memory_whose_step_changes_its_block_is_refused():
    class Growing(Memory):
        def empty(self, capacity, cell):
            return jnp.zeros((1,))

        def step(self, block, i, cell, query, shared):
            return jnp.append(block, cell), cell

    cache = Cache.empty(8, [(Growing(), ())])
    with pytest.raises(ValueError, match=r"block of shapes \(2,\) from one of shapes \(1,\)"):
        cache.begin(0).write_read(Growing(), jnp.float32(1), None)


@pytest.mark.parametrize("memory", [Memory(), type("Half", (Memory,), {})()])
def test_a_memory_must_say_what_it_is(memory):
    with pytest.raises(NotImplementedError, match="does not say what an empty block is"):
        Cache.empty(8, [(memory, CELL)])


def test_shapes_of_cells_may_be_given_as_tuples():
    held = {"x": (2, 3), "y": [(), jax.ShapeDtypeStruct((4,), jnp.bfloat16)], "z": jnp.ones(5, int)}
    block = Cache.empty(6, [(Cells(lambda *_: 0), held)])._blocks[0]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), block)
    assert shapes == {
        "x": ((6, 2, 3), "float32"),
        "y": [((6,), "float32"), ((6, 4), "bfloat16")],
        "z": ((6, 5), "int32"),
    }


@pytest.mark.parametrize("capacity", [0, -2])
def test_capacity_below_one_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity}; a cache holds at least 1 position"):
        empty(capacity=capacity)


def test_a_cache_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        empty(count=0)


def test_a_cache_is_not_changed_by_what_reads_it():
    config = presets["tiny"].replace(num_layers=2)
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    cache = init_cache(config, 8)
    before = jax.tree.map(np.array, cache)
    after, _ = jax.jit(lambda cache: run(program(config), params, cache, np.arange(4)))(cache)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, cache), before)
    assert isinstance(after, Cache)
    assert np.any(np.asarray(jax.tree.leaves(after)[0]) != 0)


def scan(layers, cache=None, repeats=3):
    """Traces a program whose layers run as one compiled loop."""

    def f(params, cache, token, i):
        turn, x = cache.begin(i).scan(layers, jnp.float32(0), params)
        return turn.end(), jnp.zeros(7) + x

    cache = empty(2, repeats=3) if cache is None else cache
    return jax.eval_shape(lambda: run(f, jnp.zeros(repeats), cache, np.arange(4)))


def repeat(turn, x, p, times=2):
    """What one repeat does to two blocks."""
    for _ in range(times):
        turn, z = turn.write_read(MEMORY, CELL, QUERY)
        x += z.sum() + p
    return turn, x


def test_each_repeat_writes_each_block_once():
    cache, logits = scan(repeat)
    assert cache.repeats == 3 and logits.shape == (4, 7)
    with pytest.raises(ProgramError, match=r"repeat .* ended after 1 of 2 blocks.*block 1"):
        scan(partial(repeat, times=1))
    with pytest.raises(ProgramError, match=r"called 3 times.*2 blocks"):
        scan(partial(repeat, times=3))


def test_a_token_does_not_end_within_a_repeat():
    with pytest.raises(ProgramError, match=r"inside of turn.scan would end the token"):
        scan(lambda turn, x, p: (repeat(turn, x, p)[0].end(), x))
    with pytest.raises(ProgramError, match=r"returned float where the turn belongs"):
        scan(lambda turn, x, p: (0.0, x))


def test_params_and_blocks_have_one_number_of_repeats():
    with pytest.raises(ValueError, match=r"cache has 3 repeats .* parameters .* have \[2\]"):
        scan(repeat, repeats=2)


def test_stacked_blocks_and_loops_go_together():
    with pytest.raises(ValueError, match=r"this cache has none; .*repeats="):
        scan(repeat, empty(2))
    with pytest.raises(ProgramError, match=r"stacked for 3 repeats; .* inside of turn.scan"):
        trace(calling(3), empty(repeats=3))


def weigh(query, cells, visible, shared):
    """A read of a window, whose cells are not alike."""
    return jnp.where(visible, cells @ query * jnp.arange(1, 4), 0).sum()


READ_AGAIN = {
    "softmax": (MEMORY, CELL, QUERY),
    "ring": (Softmax(window=4), CELL, QUERY),
    "window": (Window(3, weigh), QUERY[0], QUERY[0]),
}


@pytest.mark.parametrize("name", READ_AGAIN)
def test_reading_again_is_reading_a_block_with_the_same_cells(name, rng):
    """Also in chunks that are longer than the ring, and one by one."""
    memory, cell, query = READ_AGAIN[name]
    draw = lambda x: np.float32(rng.standard_normal((9, *x.shape)))
    tokens = jax.tree.map(draw, (cell, query, query, query))

    def again(params, cache, token, i):
        cell, first, second, other = token
        turn, a = cache.begin(i).write_read(memory, cell, first)
        turn, b = turn.write_read(memory, cell, other)
        return turn.end(), (a, turn.read(0, memory, second), b, turn.read(1, memory, first))

    def apart(params, cache, token, i):
        cell, first, second, other = token
        turn, z = cache.begin(i), []
        for q in (first, second, other, first):
            turn, one = turn.write_read(memory, cell, q)
            z.append(one)
        return turn.end(), tuple(z)

    def results(f, count, lengths):
        cache, z, begin = Cache.empty(12, [(memory, cell)] * count), [], 0
        for length in lengths:
            part = jax.tree.map(lambda x, b=begin, n=length: x[b : b + n], tokens)
            i = jnp.arange(begin, begin + length, dtype=jnp.int32)
            cache, one = parallel(f, None, cache, part, i)
            z, begin = [*z, one], begin + length
        return jax.tree.map(lambda *x: jnp.concatenate(x), *z)

    compute = jax.jit(results, static_argnums=(0, 1, 2))
    expected = compute(apart, 4, (9,))
    for lengths in ((9,), (2, 5, 1, 1)):
        for x, y in zip(compute(again, 2, lengths), expected, strict=True):
            # float32: sums of a few terms, in another order.
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
