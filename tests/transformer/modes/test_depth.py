"""The depth of lawful programs, of programs that are not, and of what JAX wraps around them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.programs import (
    attention,
    gated_delta,
    linear_attention,
    looped_scan,
    recurrent,
    shared_keys,
    token_shift,
)
from examples.programs.unlawful import feedback, out_of_order
from transformer import Cache, Cells, Config, init_cache, init_params, presets, program
from transformer.modes.depth import depth

WIDTH = 4
MEAN = Cells(lambda query, cells, visible, shared: query + visible @ cells)


def of_example(module, length, f=None):
    params = jax.eval_shape(module.init, jax.random.key(0))
    return depth(f or module.program, params, module.empty(8), length)


def of_config(config, length):
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return depth(program(config), params, init_cache(config, 8), length)


@given(
    st.sampled_from([2, 4, 6]),
    st.sampled_from([None, 3, (3, None)]),
    st.booleans(),
    st.sampled_from(["none", "segments"]),
    st.integers(1, 5000),
)
@settings(max_examples=8)
def test_a_transformer_is_as_deep_as_its_layers(layers, window, scanned, remat, length):
    config = Config(
        vocab_size=7, max_length=8, num_layers=layers, width=8, num_heads=2, window=window,
        scan_layers=scanned, remat=remat,
    )  # fmt: skip
    assert of_config(config, length) == layers


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(("length", "pieces"), [(1, 1), (64, 1), (65, 2), (1024, 16)])
def test_the_delta_rule_counts_its_pieces(scanned, length, pieces):
    """Three layers of it, each behind a short convolution, and one of attention."""
    config = presets["tiny-hybrid"].replace(scan_layers=scanned)
    assert of_config(config, length) == 3 * (1 + pieces) + 1


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (attention, lambda length: 2),
        (token_shift, lambda length: 2),
        (shared_keys, lambda length: 4),
        (looped_scan, lambda length: 3),
        (linear_attention, lambda length: 2 * max(1, (length - 1).bit_length())),
        (gated_delta, lambda length: 2 * length),
        (recurrent, lambda length: 2 * length),
        (feedback, lambda length: 2 * length),
        (out_of_order, lambda length: 2),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 3, 64, 100])
def test_examples(module, expected, length):
    assert of_example(module, length) == expected(length)


@given(st.data())
@settings(max_examples=20)
def test_it_is_the_longest_path_of_the_program(data):
    """Programs in which cell, query and logits each take some of what was read before."""
    some = st.sets(st.integers(0, 5))
    blocks = data.draw(st.lists(st.tuples(some, some, st.booleans()), min_size=1, max_size=5))
    last = data.draw(some)

    def f(params, cache, token, i):
        turn, read = cache.begin(i), [params]
        take = lambda which: sum((read[n] for n in which if n < len(read)), jnp.zeros(WIDTH))
        for n, (cell, query, again) in enumerate(blocks):
            turn, z = turn.write_read(MEAN, take(cell), take(query))
            read.append(turn.read(n, MEAN, z) if again else z)
        return turn.end(), take(last)

    levels, cells = [0], []
    take = lambda which: max((levels[n] for n in which if n < len(levels)), default=0)
    for cell, query, again in blocks:
        cells.append(take(cell))
        levels.append(max(take(cell), take(query)) + 1 + again)
    cache = Cache.empty(8, [(MEAN, (WIDTH,))] * len(blocks))
    assert depth(f, jnp.zeros(WIDTH), cache, 100) == max(take(last), *cells)


def recurrent_by_hand(params, cache, token, i):
    """A cache of one's own, and no instruction."""
    state = jnp.tanh(cache["state"] @ params["recurrence"] + params["embedding"][token])
    return {"state": state}, state


HAND_PARAMS = {"recurrence": jnp.zeros((WIDTH, WIDTH)), "embedding": jnp.zeros((7, WIDTH))}


@pytest.mark.parametrize("length", [1, 2, 50])
def test_a_recurrent_network_by_hand_is_as_deep_as_its_tokens(length):
    cache = {"state": jnp.zeros(WIDTH)}
    assert depth(recurrent_by_hand, HAND_PARAMS, cache, length) == length


@pytest.mark.parametrize("length", [1, 2, 50])
def test_a_last_block_read_early_by_hand(length):
    """Per token: the early read, the layers before the last, and at the end the last one."""

    def f(params, cache, token, i):
        before = (jnp.arange(8) < i) @ cache._blocks[-1]
        turn, x = cache.begin(i), params[token] + before
        for _ in range(3):
            turn, x = turn.write_read(MEAN, x, x)
        return turn.end(), x

    cache = Cache.empty(8, [(MEAN, (WIDTH,))] * 3)
    assert depth(f, jnp.zeros((7, WIDTH)), cache, length) == 3 * length + 1


def with_custom_jvp(f):
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return f


def with_custom_vjp(f):
    f = jax.custom_vjp(f)
    f.defvjp(f, f)
    return f


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_custom_jvp, with_custom_vjp])
def test_what_jax_wraps_is_looked_into(wrap):
    assert of_example(attention, 50, wrap(attention.program)) == 2
    assert of_example(feedback, 50, wrap(feedback.program)) == 100


def test_branches_count_as_the_deepest():
    def f(params, cache, token, i):
        deep = lambda: recurrent_by_hand(params, cache, token, i)
        return jax.lax.cond(token > 3, lambda: (cache, params["embedding"][0]), deep)

    assert depth(f, HAND_PARAMS, {"state": jnp.zeros(WIDTH)}, 50) == 50


def test_a_while_loop_must_not_grow():
    """One that makes nothing deeper is looked through, another one is refused."""

    def f(params, cache, token, i, body):
        turn, z = cache.begin(i).write_read(MEAN, params, params)
        z = jax.lax.while_loop(lambda z: z.sum() < 1, body, z)
        return turn.end(), z

    cache = Cache.empty(8, [(MEAN, (WIDTH,))])
    still = lambda *operands: f(*operands, body=lambda z: z + 1)
    assert depth(still, jnp.zeros(WIDTH), cache, 50) == 1

    def grows(params, cache, token, i):
        begin = cache.begin(i)
        read = lambda z: begin.write_read(MEAN, params, z)[1]
        turn, z = begin.write_read(MEAN, params, params)
        return turn.end(), jax.lax.while_loop(lambda z: z.sum() < 1, read, z)

    with pytest.raises(ValueError, match="a while loop makes the program deeper"):
        depth(grows, jnp.zeros(WIDTH), cache, 50)


def test_a_memory_says_how_deep_it_is():
    @dataclasses.dataclass(frozen=True)
    class Halved(type(MEAN)):
        def depth(self, length):
            return max(1, length // 2)

    half = Halved(MEAN.read)

    def f(params, cache, token, i):
        turn, z = cache.begin(i).write_read(half, params, params)
        return turn.end(), z

    assert depth(f, jnp.zeros(WIDTH), Cache.empty(8, [(half, (WIDTH,))]), 50) == 25


def test_errors():
    with pytest.raises(ValueError, match="length=0; it must be at least 1"):
        of_example(attention, 0)
    with pytest.raises(ValueError, match="the program got a cache of structure"):
        of_example(attention, 5, lambda params, cache, token, i: (cache._blocks, token))
