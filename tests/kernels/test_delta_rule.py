"""The gated delta rule: many tokens against one after the other, and both against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.delta_chunks import chunk
from kernels.delta_rule import run, step
from kernels.dot import has_kernel

# (T, N, Hk, Hv): one token, less than a chunk of 64, and several. Few shapes, so that examples
# share what is compiled.
SHAPES = [(1, 1, 3, 2), (13, 2, 3, 5), (150, 2, 5, 3)]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(rng, T, N, Hk, Hv, i=None):
    """A state and T tokens in float64, with positions 3, 4, 5, ... unless they are given."""
    q, k = unit(rng.normal(size=(2, T, N, Hk)))
    v, state = rng.normal(size=(T, N, Hv)), rng.normal(size=(N, Hk, Hv))
    g, beta = -rng.exponential(size=(T, N)), rng.uniform(size=(T, N))
    return state, np.arange(3, T + 3) if i is None else i, q, k, v, g, beta


@st.composite
def cases(draw):
    """Documents in a row, the first one begun before, with padding at the end or anywhere."""
    T, *sizes = draw(st.sampled_from(SHAPES))
    i = np.arange(T) + draw(st.integers(0, 5))
    for start in draw(st.lists(st.integers(0, T - 1), max_size=4)):
        i[start:] = np.arange(T - start)
    i[T - draw(st.integers(0, T)) :] = -1
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    i[rng.uniform(size=T) < draw(st.sampled_from([0, 0.1]))] = -1
    state, i, q, k, v, g, beta = make(rng, T, *sizes, i)
    # From tokens that keep nearly all to tokens that keep nearly nothing, and some keep nothing.
    g = g * 10.0 ** rng.uniform(-4, 2, g.shape)
    g[rng.uniform(size=g.shape) < draw(st.sampled_from([0, 0.05]))] = -np.inf
    return state, i, q, k, v, g, beta


def by_hand(state, i, q, k, v, g, beta):
    """The rule as it is written, in NumPy."""
    z = np.zeros(v.shape)
    for t in np.flatnonzero(i >= 0):
        for n in range(len(state)):
            decayed = np.exp(g[t, n]) * (np.zeros_like(state[n]) if i[t] == 0 else state[n])
            new = beta[t, n] * np.outer(k[t, n], v[t, n] - decayed.T @ k[t, n])
            state = np.concatenate([state[:n], [decayed + new], state[n + 1 :]])
            z[t, n] = state[n].T @ q[t, n]
    return state, z


def scan(state, *tokens):
    """One token after the other."""
    return jax.lax.scan(lambda state, token: step(state, *token), state, tokens)


@partial(jax.jit, static_argnums=0)
def with_gradients(function, case, cotangents):
    """What `function` returns, and its gradients by everything but the positions."""
    state, i, *tokens = case
    result, pull = jax.vjp(lambda state, *tokens: function(state, i, *tokens), state, *tokens)
    return result, pull(cotangents)


def narrow(case, dtype):
    """The state and the tokens in float32, the tokens by way of `dtype`."""
    state, i, *tokens = case
    # Of NumPy, whose slices are not compiled.
    return np.float32(state), np.int32(i), *(x.astype(jnp.dtype(dtype)) for x in tokens)


def assert_close(got, expected, tolerance):
    """Each array within `tolerance` of its largest number, or of 1."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max(initial=0)))


@settings(max_examples=30)
@given(cases())
def test_chunk_is_one_token_after_the_other(case):
    state, i, *tokens = case
    with jax.enable_x64(True):
        rng = np.random.default_rng(len(i))
        cotangents = tuple(rng.normal(size=x.shape) for x in (state, tokens[2]))
        one_by_one = with_gradients(scan, case, cotangents)
        at_once = with_gradients(chunk, case, cotangents)
    # Rounding of float64, 1e-16, over sums of up to 150 tokens.
    assert_close(one_by_one[0], by_hand(*case), 1e-12)
    assert_close(at_once, one_by_one, 1e-12)
    np.testing.assert_array_equal(np.asarray(at_once[0][1])[i < 0], 0)


@settings(max_examples=20)
@given(st.sampled_from([chunk, run]), cases(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_the_state_is_float32_and_z_has_the_type_of_the_query(function, case, dtype):
    case = narrow(case, dtype)
    state, z = jax.jit(function)(*case)
    assert (state.dtype, z.dtype) == (jnp.float32, dtype)
    exact_state, exact_z = by_hand(*(np.asarray(x, np.float64) for x in case))
    # Rounding of float32, 6e-8, in sums that it enters a few times for each token.
    assert_close(state, exact_state, 1e-5)
    # z is rounded once more, to its type.
    assert_close(z, exact_z, 1e-5 + float(jnp.finfo(dtype).eps))


def test_two_chunks_are_one_longer_chunk(rng):
    state, *tokens = make(rng, 90, 2, 4, 3, np.r_[7:40, 0:57])
    with jax.enable_x64(True):
        whole = jax.jit(chunk)(state, *tokens)
        middle, first = jax.jit(chunk)(state, *(x[:77] for x in tokens))
        end, second = jax.jit(chunk)(middle, *(x[77:] for x in tokens))
    assert_close((end, np.concatenate([first, second])), whole, 1e-12)  # rounding of float64


@settings(max_examples=20)
@given(st.booleans(), cases())
def test_gradients_in_float32(exact, case):
    state, i, *tokens = narrow(case, jnp.float32)
    rng = np.random.default_rng(len(i))
    cotangents = tuple(rng.normal(size=x.shape).astype(np.float32) for x in (state, tokens[2]))
    got = with_gradients(partial(run, exact=exact), (state, i, *tokens), cotangents)
    wide = lambda *arrays: tuple(map(np.float64, arrays))
    with jax.enable_x64(True):
        expected = with_gradients(scan, (*wide(state), i, *wide(*tokens)), wide(*cotangents))
    assert_close(got, expected, 2e-5)  # rounding of float32 in sums of up to 150 tokens


@pytest.mark.parametrize("function", [scan, chunk, run])
def test_what_is_not_read_may_be_nan(rng, function):
    """The state before position 0, padding, and a log decay of -inf, also in gradients."""
    state, i, q, k, v, g, beta = make(rng, 20, 2, 4, 3, np.r_[0:9, 0:8, -1, -1, -1])
    g[3] = -np.inf
    padded = [
        np.where(np.arange(20).reshape(-1, *[1] * (x.ndim - 1)) < 17, x, np.nan)
        for x in (q, k, v, g, beta)
    ]
    case = narrow((np.full_like(state, np.nan), i, *padded), jnp.float32)
    clean = narrow((state, i, q, k, v, g, beta), jnp.float32)
    cotangents = jnp.ones_like(case[0]), jnp.ones_like(case[4])
    got, expected = (with_gradients(function, x, cotangents) for x in (case, clean))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_keys_that_are_all_alike(rng):
    """The inverse stays as accurate as a scan where a power series of it would overflow."""
    state, i, q, k, v, g, beta = make(rng, 128, 1, 8, 4)
    k[:], g[:], beta[:] = k[0], 0, 1
    case = state, i, q, k, v, g, beta
    # As in float32 above.
    assert_close(jax.jit(chunk)(*narrow(case, jnp.float32)), by_hand(*case), 1e-5)


def test_a_slow_decay_keeps_its_digits_behind_fast_ones(rng):
    """What 60 fast decays leave is nothing, and 4 slow ones after them keep nearly all."""
    case = make(rng, 64, 1, 8, 4)
    case[-2][:60], case[-2][60:] = -90, -1e-3
    # 1e-6 is a few roundings of float32; a difference of running sums near 5400 errs by 2e-4.
    assert_close(jax.jit(chunk)(*narrow(case, jnp.float32)), by_hand(*case), 1e-6)


def test_sequences_tangents_and_remat(rng):
    """vmap is a loop over sequences; forward mode and remat agree with reverse mode."""
    rows = [make(rng, 7, 2, 4, 3, np.int32(i)) for i in (range(7), [5, 6, 0, 1, 2, 0, -1])]
    batch = [np.stack(x) for x in zip(*rows, strict=True)]
    weights = rng.normal(size=batch[4].shape)

    def loss(function, state, i, *tokens):
        state, z = jax.vmap(function)(state, i, *tokens)
        return (z * weights).sum() + (state**2).sum()

    with jax.enable_x64(True):
        got = jax.jit(jax.vmap(chunk))(*batch)
        assert_close(
            got, [np.stack(x) for x in zip(*(by_hand(*x) for x in rows), strict=True)], 1e-12
        )
        state, i, *tokens = map(jnp.asarray, batch)
        of = lambda function: lambda state, *tokens: loss(function, state, i, *tokens)
        directions = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in (state, *tokens))
        gradient = jax.grad(of(jax.checkpoint(chunk)), argnums=range(6))
        # Forward over reverse: the slope in a direction, and how the gradient changes along it.
        gradients, changes = jax.jit(partial(jax.jvp, gradient))((state, *tokens), directions)
        _, slope = jax.jit(partial(jax.jvp, of(chunk)))((state, *tokens), directions)
        expected = jax.jit(partial(jax.jvp, jax.grad(of(scan), argnums=range(6))))(
            (state, *tokens), directions
        )
    inner = sum(np.vdot(x, y) for x, y in zip(gradients, directions, strict=True))
    assert_close(slope, inner, 1e-12)  # rounding of float64 over sums of hundreds of numbers
    assert_close((gradients, changes), expected, 1e-12)


def test_any_order_of_transformations(rng):
    """Sequences that are mapped inside and outside of gradients, tangents and remat."""
    case = narrow(make(rng, 7, 2, 4, 3), jnp.float32)
    state, i, *tokens = case
    rows = [jnp.stack([x, 0.5 * x, -x]) for x in (state, *tokens[:3])]
    given = *rows, *tokens[3:]  # the decay and the strength are those of all
    axes = *[0] * 4, None, None

    def results(function, *given):
        def one(state, *tokens):
            state, z = function(state, i, *tokens)
            return jnp.sin(z).sum() + (state**2).sum()

        def whole(*given):
            return jax.vmap(jax.checkpoint(one), axes)(*given).sum()

        of_all = jax.grad(whole, range(6))
        of_each = jax.vmap(jax.grad(one, range(4)), axes)
        directions = tuple(0.1 * x for x in given)
        return (
            of_each(*given),
            jax.jvp(of_all, given, directions),
            jax.jvp(whole, given, directions),
        )

    got = jax.jit(partial(results, run))(*given)
    with jax.enable_x64(True):
        expected = jax.jit(partial(results, scan))(*map(np.float64, given))
    assert_close(got, expected, 1e-5)  # rounding of float32, as above


@pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")
@settings(max_examples=10)
@given(cases(), st.data())
def test_the_same_bits_however_it_is_cut(case, data):
    """Also in bfloat16, and by tokens; the numerics make no difference where a kernel runs both."""
    state, *tokens = narrow(case, data.draw(st.sampled_from([jnp.float32, jnp.bfloat16])))
    go = jax.jit(run, static_argnames="exact")
    whole = go(state, *tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens[0])), max_size=4)))
    reads = []
    for begin, end in zip([0, *cuts], [*cuts, len(tokens[0])], strict=True):
        state, z = go(state, *(x[begin:end] for x in tokens), exact=True)
        reads.append(z)
    np.testing.assert_array_equal(state, whole[0])
    np.testing.assert_array_equal(np.concatenate(reads), whole[1])


def test_few_tokens_do_not_cost_a_chunk_of_64(rng):
    def flops(T):
        return (
            jax.jit(chunk)
            .lower(*narrow(make(rng, T, 2, 16, 16), "float32"))
            .cost_analysis()["flops"]
        )

    assert flops(4) < flops(64) / 15  # in proportion to the tokens, or better


@pytest.mark.parametrize("function", [chunk, run])
def test_inside_shard_map(rng, function):
    state, i, *tokens = narrow(make(rng, 5, 2, 4, 3), jnp.float32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), *[P(None, "data")] * 5)
    split = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=(P("data"), P(None, "data"))
    )
    # The same operations; a compiler may add numbers in another order.
    assert_close(jax.jit(split)(state, i, *tokens), jax.jit(function)(state, i, *tokens), 1e-6)


def test_what_does_not_fit_is_named(rng):
    state, i, q, k, v, g, beta = narrow(make(rng, 5, 2, 4, 3), jnp.float32)
    for function in chunk, run:
        with pytest.raises(ValueError, match=r"k must be \(5, 2, 4\).* but it is \(5, 2, 3\)"):
            function(state, i, q, k[..., :3], v, g, beta)
    with pytest.raises(ValueError, match="float32 or float64, but it is bfloat16"):
        step(state.astype(jnp.bfloat16), i[0], q[0], k[0], v[0], g[0], beta[0])
