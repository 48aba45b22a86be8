"""The gated delta rule on a CPU: the definition in float64, and the same bits in any company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import Blocks
from kernels.cpu.call import is_available
from kernels.cpu.delta_rule import delta_rule as of_blocks
from kernels.cpu.delta_rule_gradient import gradients
from kernels.delta_rule import step

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels of a CPU, with multiply-adds")

# (B, T, N, Hk, Hv): one number, whole vectors, and several pieces of columns, the last one short.
SHAPES = [(1, 1, 1, 1, 1), (3, 9, 2, 16, 64), (2, 20, 3, 21, 150)]


@jax.jit
def delta_rule(state, *tokens):
    """The kernel, on states by themselves."""
    return of_blocks(Blocks(state, batched=True), *tokens)


@st.composite
def cases(draw):
    """States and tokens; padding and new documents anywhere."""
    B, T, N, Hk, Hv = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    i = rng.integers(1, 99, (B, T))
    i[rng.uniform(size=(B, T)) < draw(st.sampled_from([0, 0.1]))] = 0
    i[rng.uniform(size=(B, T)) < draw(st.sampled_from([0, 0.3, 1]))] = -1
    q, k = rng.standard_normal((2, B, T, N, Hk)) / np.sqrt(Hk)
    v, state = rng.standard_normal((B, T, N, Hv)), rng.standard_normal((B, N, Hk, Hv))
    g, beta = -rng.exponential(size=(B, T, N)), rng.uniform(size=(B, T, N))
    g[rng.uniform(size=g.shape) < draw(st.sampled_from([0, 0.1]))] = -np.inf
    tokens = (x.astype(np.float32) for x in (q, k, v, g, beta))
    return state.astype(np.float32), i.astype(np.int32), *tokens


@jax.jit
def by_definition(state, *tokens):
    """One token after the other, with the logarithms of decays."""
    one = lambda state, *tokens: jax.lax.scan(lambda S, token: step(S, *token), state, tokens)
    return jax.vmap(one)(state, *tokens)


@jax.jit
def gradients_by_definition(case, cotangents):
    """Of all operands but the positions."""
    state, i, *tokens = case
    run = lambda state, *tokens: by_definition(state, i, *tokens)
    return jax.vjp(run, state, *tokens)[1](tuple(cotangents))


def wide(arrays):
    """Arrays in float64; positions as they are."""
    return [np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype) for x in arrays]


def for_kernel(state, *tokens):
    """The decay in place of its logarithm."""
    *others, g, beta = tokens
    return state, *others, np.exp(g), beta


def assert_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        # Sums of at most 64 terms of about 1 in float32, a few times for each of 20 tokens.
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1, np.abs(y).max(initial=0)))


@settings(max_examples=20)
@given(cases())
def test_the_definition(case):
    with jax.enable_x64(True):
        expected = by_definition(*wide(case))
    got = delta_rule(*for_kernel(*case))
    assert_close(got, expected)
    np.testing.assert_array_equal(got[1][case[1] < 0], 0)


@settings(max_examples=20)
@given(cases(), st.data())
def test_the_same_bits_in_any_company(case, data):
    """In two chunks, as one sequence, as one head, and without the padding."""
    state, i, *tokens = for_kernel(*case)
    whole = [np.asarray(x) for x in delta_rule(state, i, *tokens)]
    cut = data.draw(st.integers(0, i.shape[1]))
    middle, first = delta_rule(state, i[:, :cut], *(x[:, :cut] for x in tokens))
    last, second = delta_rule(middle, i[:, cut:], *(x[:, cut:] for x in tokens))
    np.testing.assert_array_equal(last, whole[0])
    np.testing.assert_array_equal(np.concatenate([first, second], 1), whole[1])
    b, n = (data.draw(st.integers(0, size - 1)) for size in state.shape[:2])
    real = i[b] >= 0
    alone = delta_rule(
        state[b : b + 1, n : n + 1],
        i[b : b + 1, real],
        *(x[b : b + 1, real, n : n + 1] for x in tokens),
    )
    np.testing.assert_array_equal(alone[0], whole[0][b : b + 1, n : n + 1])
    np.testing.assert_array_equal(alone[1][0], whole[1][b, real, n : n + 1])


def test_many_tokens_are_split_among_threads(rng):
    """As few as one by one are not: the bits are the same."""
    B, T, N, H = 2, 200, 3, 64
    q, k, v = (rng.standard_normal((B, T, N, H)).astype(np.float32) / 8 for _ in range(3))
    decay, beta = rng.uniform(size=(2, B, T, N)).astype(np.float32)
    tokens = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), q, k, v, decay, beta
    state = jnp.zeros((B, N, H, H))
    whole = jax.jit(delta_rule)(state, *tokens)
    by_token = [jnp.swapaxes(x, 0, 1)[:, :, None] for x in tokens]
    state, z = jax.jit(lambda *x: jax.lax.scan(lambda S, t: delta_rule(S, *t), *x))(state, by_token)
    np.testing.assert_array_equal(state, whole[0])
    np.testing.assert_array_equal(z[:, :, 0].swapaxes(0, 1), whole[1])


def test_one_layer_of_a_stack(rng):
    """It alone changes, and where it is donated, in place."""
    B, L, N, H = 2, 3, 2, 5
    q, k, v = rng.standard_normal((3, B, 4, N, H)).astype(np.float32)
    decay, beta = rng.uniform(size=(2, B, 4, N)).astype(np.float32)
    tokens = np.broadcast_to(np.arange(7, 11, dtype=np.int32), (B, 4)), q, k, v, decay, beta
    states = rng.standard_normal((B, L, N, H, H)).astype(np.float32)
    run = jax.jit(lambda x, n: of_blocks(Blocks(x, n, batched=True), *tokens), donate_argnums=0)
    after, z = run(jnp.array(states), 1)
    expected = delta_rule(states[:, 1], *tokens)
    np.testing.assert_array_equal(after[:, 1], expected[0])
    np.testing.assert_array_equal(z, expected[1])
    np.testing.assert_array_equal(after[:, ::2], states[:, ::2])
    assert " copy(" not in run.lower(states, 1).compile().as_text()


def test_what_is_not_read_may_be_nan(rng):
    """The state before position 0, and padding."""
    i = np.array([[-1, 0, 1, -1, 2]], np.int32)
    q, k, v = (rng.standard_normal((1, 5, 1, 3)).astype(np.float32) for _ in range(3))
    decay, beta = rng.uniform(size=(2, 1, 5, 1)).astype(np.float32)
    clean = [q, k, v, decay, beta]
    padding = lambda x: np.where((i < 0).reshape(1, 5, *[1] * (x.ndim - 2)), np.nan, x)
    got = delta_rule(jnp.full((1, 1, 3, 3), jnp.nan), i, *map(padding, clean))
    expected = delta_rule(jnp.zeros((1, 1, 3, 3)), i, *clean)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    untouched = jnp.full((1, 1, 3, 3), jnp.nan)
    state, z = delta_rule(untouched, np.full_like(i, -1), *clean)
    np.testing.assert_array_equal(state, untouched)
    np.testing.assert_array_equal(z, 0)


@settings(max_examples=20)
@given(cases())
def test_gradients(case):
    """Of tokens without padding; where a decay is 0, documents begin."""
    state, i, *tokens = case
    i = np.ones_like(i)
    rng = np.random.default_rng(0)
    cotangents = [rng.standard_normal(x.shape).astype(np.float32) for x in (state, tokens[2])]
    state, _, *operands = for_kernel(state, i, *tokens)
    got = jax.jit(gradients)(state, *operands, *cotangents)
    with jax.enable_x64(True):
        expected = gradients_by_definition(wide((state, i, *tokens)), wide(cotangents))
    assert_close(got, expected)
