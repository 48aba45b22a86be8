"""The Triton source of attention, run by the interpreter, against the formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.options import Options

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.triton import interpret

# Largest difference from float64, in units of the largest value of the result. float32: sums of up
# to some hundred products, each rounded by 6e-8. The others: inputs are exact in both, weights and
# results are rounded once (bfloat16 8 bits, float16 11 bits), and a gradient is a product of those.
TOLERANCE = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2.5e-2}


def make_case(seed, *, B, T, S, N, K, H, dtype, window, soft_cap, held, starts, sinks, alibi):
    """Operands of `attend` and cotangents of its results; about one query in ten is padding."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    span = S + 5 if held else S
    q_positions = np.sort(rng.integers(0, span, (B, T)), axis=1).astype(np.int32)
    q_positions[rng.random((B, T)) < 0.1] = -1
    kv_positions = None
    if held:  # any order, and about one cell in ten is empty
        kv_positions = np.stack([rng.permutation(span)[:S] for _ in range(B)]).astype(np.int32)
        kv_positions[rng.random((B, S)) < 0.1] = -1
    q_starts = None
    if starts:
        q_starts = np.maximum(q_positions - rng.integers(0, S, (B, T)), 0).astype(np.int32)
    operands = {
        "q": normal(B, T, N, H),
        "keys": normal(B, K, S, H),
        "values": normal(B, K, S, H),
        "q_positions": q_positions,
        "kv_positions": kv_positions,
        "q_starts": q_starts,
        "sinks": normal(N, dtype=jnp.float32) if sinks else None,
        "alibi": rng.uniform(0.01, 0.5, N).astype(np.float32) if alibi else None,
    }
    options = Options(scale=H**-0.5, window=window, soft_cap=soft_cap)
    return operands, options, (normal(B, T, N, H), normal(B, T, N, dtype=jnp.float32))


def results_and_gradients(attend, operands, options, cotangents):
    """(z, lse) and the gradients of q, keys, values and sinks; as NumPy arrays."""
    moving = {n: operands[n] for n in ("q", "keys", "values", "sinks") if operands[n] is not None}
    fixed = {name: x for name, x in operands.items() if name not in moving}

    def run(moving):
        z, lse = attend(**moving, **fixed, options=options)
        # A row that sees nothing has a log-sum-exp of -inf, which has no gradient.
        return z, jnp.where(jnp.isneginf(lse), 0, lse)

    @jax.jit
    def run_and_pull(moving, cotangents):
        results, pull = jax.vjp(run, moving)
        cotangents = jax.tree.map(lambda c, r: c.astype(r.dtype), cotangents, results)
        return results, pull(cotangents)[0]

    return jax.tree.map(np.asarray, run_and_pull(moving, cotangents))


def in_float64(tree):
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def assert_close(got, want, tolerance):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


@st.composite
def cases(draw):
    K = draw(st.sampled_from([1, 2]))
    maybe = st.booleans()
    return make_case(
        draw(st.integers(0, 2**32)),
        B=draw(st.sampled_from([1, 2])),
        T=draw(st.integers(1, 80)),
        S=draw(st.integers(1, 200)),
        N=K * draw(st.sampled_from([1, 3])),
        K=K,
        H=draw(st.sampled_from([32, 40, 64, 80])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        window=draw(st.sampled_from([None, 1, 20, 64])),
        soft_cap=draw(st.sampled_from([None, 2.0])),
        held=draw(maybe),
        starts=draw(maybe),
        sinks=draw(maybe),
        alibi=draw(maybe),
    )


@settings(max_examples=10, derandomize=False, deadline=None)
@given(cases())
def test_equals_the_formula_in_float64(case):
    operands, options, cotangents = case
    got = results_and_gradients(interpret.attend, operands, options, cotangents)
    with jax.enable_x64(True):
        want = results_and_gradients(
            reference.attend, *in_float64((operands,)), options, in_float64(cotangents)
        )
    assert_close(got, want, TOLERANCE[str(operands["q"].dtype)])


def small_case(seed, **changes):
    plain = {"window": None, "soft_cap": None, "held": False, "starts": False, "sinks": False}
    sizes = {"B": 2, "T": 70, "S": 100, "N": 2, "K": 1, "H": 32, "dtype": "float32"}
    return make_case(seed, **(plain | {"alibi": False} | sizes | changes))


@pytest.mark.parametrize("H", [128, 256])
def test_large_heads(H):
    seed = np.random.SeedSequence().entropy
    operands, options, cotangents = small_case(seed, B=1, T=33, S=65, H=H)
    got = results_and_gradients(interpret.attend, operands, options, cotangents)
    with jax.enable_x64(True):
        want = results_and_gradients(
            reference.attend, *in_float64((operands,)), options, in_float64(cotangents)
        )
    assert_close(got, want, TOLERANCE["float32"])


@pytest.mark.parametrize("held", [False, True])
def test_unseen_cells_change_nothing(held):
    """Not a number in every cell that no query sees gives the same bits, and gradients of zero."""
    seed = np.random.SeedSequence().entropy
    operands, options, cotangents = small_case(seed, window=7, held=held)
    operands["q_positions"] = np.stack([np.arange(15, 85), np.arange(20, 90)]).astype(np.int32)
    held_positions = operands["kv_positions"] if held else np.arange(100)[None]
    distance = operands["q_positions"][:, :, None] - held_positions[:, None, :]
    seen = ((distance >= 0) & (distance < 7)).any(1)
    unseen = ~(seen & (held_positions >= 0))[:, None, :, None]
    poisoned = operands | {
        name: jnp.where(unseen, jnp.nan, operands[name]) for name in ("keys", "values")
    }
    run = partial(results_and_gradients, interpret.attend)
    clean, dirty = (run(x, options, cotangents) for x in (operands, poisoned))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for name in ("keys", "values"):
        gradient = dirty[1][name]
        assert (gradient[np.broadcast_to(unseen, gradient.shape)] == 0).all()


def test_same_bits_every_time():
    operands, options, cotangents = small_case(np.random.SeedSequence().entropy, starts=True)
    run = partial(results_and_gradients, interpret.attend, operands, options, cotangents)
    jax.tree.map(np.testing.assert_array_equal, run(), run())


def test_a_query_that_sees_nothing():
    operands, options, cotangents = small_case(np.random.SeedSequence().entropy)
    operands["q_positions"][:, 5:50] = -1
    (z, _), gradients = results_and_gradients(interpret.attend, operands, options, cotangents)
    assert (z[:, 5:50] == 0).all()
    _, lse = interpret.attend(**operands, options=options)
    assert np.isneginf(np.asarray(lse)[:, 5:50]).all()
    assert (gradients["q"][:, 5:50] == 0).all()


def test_shared_positions_and_a_narrower_cache():
    """Positions [1, T] serve all rows; a bfloat16 block is read by float32 queries."""
    operands, options, _ = small_case(np.random.SeedSequence().entropy)
    operands["q_positions"] = np.arange(70, dtype=np.int32)[None]
    operands |= {name: operands[name].astype(jnp.bfloat16) for name in ("keys", "values")}
    z, _ = interpret.attend(**operands, options=options)
    assert z.dtype == jnp.float32
    with jax.enable_x64(True):
        want, _ = reference.attend(**in_float64(operands), options=options)
    assert_close(z, want, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"H": 257}, "head size up to 256"), ({"dtype": "int32"}, "float32, bfloat16, float16")],
)
def test_what_the_kernels_cannot_do(changes, message):
    operands, options, _ = small_case(0, **changes)
    with pytest.raises(NotImplementedError, match=message):
        interpret.attend(**operands, options=options)
