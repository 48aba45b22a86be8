"""Every backend that runs here against the reference in float64: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.xla
from kernels.attention import attention

# A float32 sum of up to S products, each with a relative error of 2**-24, loses a few of the last
# digits; bfloat16 keeps 8 bits, and its weights are rounded once more before the second product.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that short sequences take several of them, and a part of one."""
    monkeypatch.setattr(kernels.xla, "KEY_TILE", 16)
    monkeypatch.setattr(kernels.xla, "QUERY_ROWS", 24)


@st.composite
def problems(draw):
    """Operands of `attention` as float64 arrays, and its options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, T, S = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 50))
    K, G, H = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 7]))
    arrays = {
        "q": rng.normal(size=(B, T, K * G, H)),
        "k": rng.normal(size=(B, S, K, H)),
        "v": rng.normal(size=(B, S, K, H)),
    }
    if draw(st.booleans()):
        arrays["sinks"] = rng.normal(size=K * G)
    rows = draw(st.sampled_from([1, B]))
    options = {
        "q_positions": np.sort(rng.integers(-1, S + 5, (rows, T)), axis=1).astype(np.int32),
        "window": draw(st.sampled_from([None, 1, 5, 30])),
        "soft_cap": draw(st.sampled_from([None, 2.0])),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    if draw(st.booleans()):
        held = np.stack([rng.permutation(S + 9)[:S] for _ in range(rows)])
        options["kv_positions"] = held.astype(np.int32) - 5
    if draw(st.booleans()):
        options["q_starts"] = rng.integers(0, S, (rows, T)).astype(np.int32)
    if draw(st.booleans()):
        options["alibi"] = rng.random(K * G)
    return arrays, options


def run(arrays, options, backend, dtype):
    """Outputs and gradients of one backend, as float64 arrays."""
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}

    def loss(arrays):
        z, lse = attention(**arrays, **options, backend=backend, return_lse=True)
        read = lse > -1e30  # a query that reads nothing has no finite log-sum-exp
        lse = jnp.where(read, lse, 0)
        weights = jnp.cos(jnp.arange(z.size)).reshape(z.shape)
        return (jnp.sin(z.astype(lse.dtype)) * weights).sum() + 0.1 * lse.sum(), (z, lse)

    results = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), results)


def assert_close(actual, expected, tolerance):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(x, np.nan_to_num(y), atol=tolerance * max(1, np.abs(y).max()))


@settings(max_examples=12)
@given(problems(), st.sampled_from(list(TOLERANCE)))
def test_backends_agree_with_the_reference(problem, dtype):
    arrays, options = problem
    arrays = {n: np.asarray(jnp.asarray(x, dtype), np.float64) for n, x in arrays.items()}
    actual = run(arrays, options, "xla", dtype)
    with jax.enable_x64(True):
        expected = run(arrays, options, "reference", jnp.float64)
    assert_close(actual, expected, TOLERANCE[dtype])


@settings(max_examples=4)
@given(problems())
def test_what_is_out_of_sight_changes_nothing(problem):
    """Garbage in cells that no query sees, however large, leaves every bit as it was."""
    arrays, options = problem
    S = arrays["k"].shape[1]
    first = lambda x: x[:1] if isinstance(x, np.ndarray) and x.ndim > 1 else x
    options = {name: first(x) for name, x in options.items()}
    alone = {name: first(x) for name, x in arrays.items()}
    length = S // 2
    options["q_positions"] = np.minimum(options["q_positions"], length - 1)
    options.pop("kv_positions", None)
    spoiled = dict(alone)
    for name in ("k", "v"):
        garbage = np.random.default_rng().choice([1e30, -1e30, 7.0], alone[name].shape)
        spoiled[name] = np.where(np.arange(S)[:, None, None] < length, alone[name], garbage)
    f = jax.jit(lambda arrays: attention(**arrays, **options, backend="xla"))
    cast = lambda arrays: {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    np.testing.assert_array_equal(f(cast(alone)), f(cast(spoiled)))


def test_the_same_bits_every_run():
    rng = np.random.default_rng()
    arrays = {n: rng.normal(size=(2, 40, 2, 8)) for n in ("q", "k", "v")}
    first, again = (run(arrays, {"window": 9}, "xla", jnp.float32) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("T", [1, 40])
def test_vmap_in_either_order_of_grad(T):
    rng = np.random.default_rng()
    q, k, v = (jnp.asarray(rng.normal(size=(3, 1, n, 2, 8)), jnp.float32) for n in (T, 40, 40))
    loss = lambda q, k, v: jnp.sin(attention(q, k, v, backend="xla")).sum()
    outside = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(q, k, v)
    inside = jax.jit(jax.grad(lambda *a: jax.vmap(loss)(*a).sum(), (0, 1, 2)))(q, k, v)
    for x, y in zip(outside, inside, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_wrong_shapes_and_backends_are_refused():
    x = jnp.zeros((1, 4, 3, 8))
    with pytest.raises(ValueError, match=r"attention takes q \[B, T, N, H\]"):
        attention(x[0], x, x)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match="'abacus' does not exist; choose one of auto"):
        attention(x, x, x, backend="abacus")
