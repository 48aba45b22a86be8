"""Every backend that runs here against the reference in float64: outputs and gradients.

These are also the tests of kernels/operands.py, of kernels/backends/{xla,cudnn,splash_interpret}.py
and of the forward and backward kernels in kernels/backends/triton.
"""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo

from kernels import attention
from kernels.backends import choice, splash, xla
from kernels.tracing.target import target

# Those for a device that is not here skip, with their reason.
TARGETS = {name: ("gpu", 90) for name in ("triton", "cudnn", "tokamax")} | {"splash": ("tpu",)}
BACKENDS = ("xla", "triton_interpret", "splash_interpret", *TARGETS)
# What a backend cannot do, and says itself (test_limits_are_said). CUDNN holds limits of cuDNN: of
# GPUs before Hopper, and of a backward pass that adds in any order.
SPLASH = {"alibi", "kv_positions", "lse", "value size"}
ONE_QUERY = {"q_positions", "kv_length"}  # for several queries only; for one, it lacks windows
NO_MODE = {"q_starts", "sinks", "soft_cap", "float32", "mixed dtypes"}
CUDNN = {"H=35", "H=256", "same bits"}
LACKS = dict.fromkeys(BACKENDS, frozenset()) | {
    "splash": SPLASH,
    "splash_interpret": SPLASH,
    "cudnn": SPLASH | ONE_QUERY | NO_MODE | CUDNN,
    "tokamax": SPLASH | {"sinks", "float32", "mixed dtypes"},
}
# What unseen cells hold. xla and splash multiply it by a weight of zero, so it must be finite.
# cudnn is not asked: it takes no positions that leave cells unseen.
GARBAGE = {"xla": 1e30, "triton": np.nan, "splash": 1e30, "tokamax": 1e30}
# Largest difference from float64, in units of the largest value of the result. float32: sums of up
# to some hundred products, each rounded by 6e-8. The others: inputs are exact in both, weights and
# results are rounded once (bfloat16 8 bits, float16 11 bits), and a gradient is a product of those.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that short sequences take several of them, and a part of one."""
    monkeypatch.setattr(xla, "KEY_TILE", 16)
    monkeypatch.setattr(xla, "QUERY_ROWS", 24)
    monkeypatch.setattr(xla, "LARGE_KEY_TILE", 48)
    monkeypatch.setattr(xla, "PARTS", 2)
    monkeypatch.setattr(splash, "TILE", 128)
    with contextlib.suppress(ImportError):  # triton may be missing
        monkeypatch.setattr("kernels.backends.triton.splitting.FEW", 16)


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    """A backend that runs here; the others skip, with their reason."""
    x = jnp.zeros((1, 2, 1, 32), jnp.bfloat16)
    try:
        jax.eval_shape(lambda x: attention(x, x, x, backend=request.param), x)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def needs(backend, *features):
    """Skips a test of what a backend cannot do."""
    if lacking := LACKS[backend].intersection(features):
        pytest.skip(f"{backend} lacks {', '.join(sorted(lacking))}")


def precise(backend):
    """The dtype with the most digits that a backend takes."""
    return "float16" if "float32" in LACKS[backend] else "float32"


@st.composite
def problems(draw, lacks=()):
    """Operands of `attention` as float64 arrays that the dtype holds exactly, and its options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([name for name in TOLERANCE if name not in lacks]))
    B, S = draw(st.integers(1, 2)), draw(st.integers(1, 150))
    T = draw(st.just(1) | st.integers(1, 80))
    sizes = [H for H in (32, 35, 40, 256) if f"H={H}" not in lacks]
    K, G, H = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(sizes))
    if "q_positions" in lacks:
        T = min(T, S)
        lacks = lacks - ONE_QUERY | {"window"} if T == 1 else lacks
    maybe = lambda name: name not in lacks and draw(st.booleans())
    normal = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64)
    Hv = draw(st.sampled_from([H, 20, 24])) if "value size" not in lacks else H
    arrays = {"q": normal(B, T, K * G, H), "k": normal(B, S, K, H), "v": normal(B, S, K, Hv)}
    if maybe("sinks"):
        arrays["sinks"] = normal(K * G)
    rows = draw(st.sampled_from([1, B]))
    q_positions = np.sort(rng.integers(0, S + 5, (rows, T)), axis=1)
    q_positions[rng.random((rows, T)) < 0.1] = -1
    options = {
        "window": draw(st.sampled_from([None, 1, 20, 64])) if "window" not in lacks else None,
        "soft_cap": 2.0 if maybe("soft_cap") else None,
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    if "q_positions" not in lacks:
        options["q_positions"] = q_positions.astype(np.int32)
    if maybe("kv_positions"):  # any order, some cells empty
        held = np.stack([rng.permutation(S + 9)[:S] for _ in range(rows)])
        options["kv_positions"] = held.astype(np.int32) - 5
    if maybe("q_starts"):
        options["q_starts"] = (q_positions - rng.integers(0, S, (rows, T))).astype(np.int32)
    if maybe("kv_length"):
        options["kv_length"] = rng.integers(0, S + 1, rows).astype(np.int32)
        if "kv_positions" in lacks:
            options["window"] = None
    if maybe("alibi"):
        options["alibi"] = rng.random(K * G)
    return arrays, options, dtype


def attend(arrays, **options):
    """`attention` as one compiled program: JAX compiles each operation that runs alone."""
    return jax.jit(lambda arrays: attention(**arrays, **options))(arrays)


def function(options, backend, lse=True):
    """A function of the arrays: their gradients and outputs."""

    def loss(arrays):
        result = attention(**arrays, **options, backend=backend, return_lse=lse)
        z, log_sum = result if lse else (result, jnp.zeros(()))
        # A query that reads nothing has a log-sum-exp of -inf, which has no gradient.
        nothing = jnp.isneginf(log_sum)
        finite = jnp.where(nothing, 0, log_sum)
        weights = jnp.cos(jnp.arange(z.size)).reshape(z.shape)
        wide = jnp.promote_types(z.dtype, jnp.float32)
        total = (jnp.sin(z.astype(wide)) * weights).sum() + 0.1 * finite.sum()
        return total, (z, finite, nothing)

    return jax.grad(loss, has_aux=True)


def cast(arrays, dtype):
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def run_all(problems, options, backend, dtype, lse=True):
    """Gradients and outputs of one backend for each of some arrays alike, as float64 arrays."""
    compiled = jax.jit(function(options, backend, lse))
    results = [compiled(cast(arrays, dtype)) for arrays in problems]
    return jax.tree.map(lambda x: np.asarray(x, np.float64), results)


def run(arrays, *how):
    """Gradients and outputs of one backend, as float64 arrays."""
    return run_all([arrays], *how)[0]


def reference(arrays, options, lse=True):
    with jax.enable_x64(True):
        return run(arrays, options, "reference", jnp.float64, lse)


def assert_close(actual, expected, tolerance):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


@settings(max_examples=3)
@given(data=st.data())
def test_outputs_and_gradients_equal_the_reference(backend, data):
    arrays, options, dtype = data.draw(problems(LACKS[backend]))
    lse = "lse" not in LACKS[backend]
    actual = run(arrays, options, backend, dtype, lse)
    assert_close(actual, reference(arrays, options, lse), TOLERANCE[dtype])


def tangents(arrays):
    return {name: jnp.cos(3 * x) for name, x in arrays.items()}


DERIVATIVES = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (tangents(x),))[1],
    "Hessian": lambda f, x: jax.jvp(jax.grad(f), (x,), (tangents(x),))[1],
}


@pytest.mark.parametrize("name", DERIVATIVES)
@settings(max_examples=2)
@given(data=st.data())
def test_forward_mode_equals_the_reference(name, data):
    """In float64: tangents of z and the log-sum-exp, and Hessian-vector products."""
    arrays, options, _ = data.draw(problems())

    def derivative(backend):
        def loss(arrays):
            z, lse = attention(**arrays, **options, backend=backend, return_lse=True)
            return jnp.sin(z).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

        return jax.jit(lambda x: DERIVATIVES[name](loss, x))(arrays)

    with jax.enable_x64(True):
        assert_close(derivative("xla"), derivative("reference"), 1e-12)  # some thousand roundings


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_backend_without_forward_mode_says_which_have_it(backend, name, jit):
    if backend in choice.FORWARD_MODE:
        pytest.skip(f"{backend} has forward mode")
    x = jnp.ones((1, 8, 1, 32), precise(backend))
    loss = lambda x: attention(x["q"], x["q"], x["q"], backend=backend).sum(dtype=jnp.float32)
    run = lambda x: DERIVATIVES[name](loss, x)
    with pytest.raises(NotImplementedError, match="products use one of xla, reference"):
        (jax.jit(run) if jit else run)({"q": x})


@pytest.mark.parametrize("backend", TARGETS)
@settings(max_examples=2)
@given(data=st.data())
def test_a_backend_of_another_platform_takes_what_would_test_it(backend, data):
    """Traced only, so that the test above is ready for the day when it runs on that platform."""
    arrays, options, dtype = data.draw(problems(LACKS[backend]))
    lse = "lse" not in LACKS[backend]
    with target(*TARGETS[backend]), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
        try:
            jax.eval_shape(function(options, backend, lse), cast(arrays, dtype))
        except NotImplementedError as error:
            if not re.search("it needs (jax-triton|tokamax)|not supported on this", str(error)):
                raise  # of a package that is missing, and one that wants the device itself
            pytest.skip(str(error))


def small_problem(rng, T=50, S=70, N=4, K=2, H=32):
    return {
        "q": rng.normal(size=(2, T, N, H)),
        "k": rng.normal(size=(2, S, K, H)),
        "v": rng.normal(size=(2, S, K, H)),
    }


def test_cells_that_no_query_sees_change_nothing(backend, rng):
    """Garbage in them, and in the other row, leaves every bit as it was; their gradient is zero."""
    needs(backend, "q_positions")
    arrays = small_problem(rng)
    options = {"window": 7, "q_positions": np.stack([np.arange(10, 60), np.full(50, -1)])}
    unseen = np.stack([(np.arange(70) < 4) | (np.arange(70) >= 60), np.ones(70, bool)])
    spoiled, filling = dict(arrays), GARBAGE[backend.removesuffix("_interpret")]
    for name in ("k", "v"):
        garbage = rng.choice([1, -1], arrays[name].shape) * filling
        spoiled[name] = np.where(unseen[:, :, None, None], garbage, arrays[name])
    clean, dirty = run_all([arrays, spoiled], options, backend, jnp.float32, False)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    gradients, (z, *_) = dirty
    assert (gradients["k"][unseen] == 0).all()
    assert (gradients["v"][unseen] == 0).all()
    assert (z[1] == 0).all()


def test_the_same_bits_every_run(backend, rng):
    needs(backend, "same bits")
    arrays = small_problem(rng)
    first, again = (run(arrays, {"window": 9}, backend, jnp.float32, False) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("T", [1, 40])
def test_vmap_in_either_order_of_grad(backend, rng, T):
    dtype = precise(backend)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 1, n, 2, 32)), dtype) for n in (T, 40, 40))
    loss = lambda q, k, v: jnp.sin(attention(q, k, v, backend=backend)).sum(dtype=jnp.float32)
    outside = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(q, k, v)
    inside = jax.jit(jax.grad(lambda *a: jax.vmap(loss)(*a).sum(), (0, 1, 2)))(q, k, v)
    assert_close(outside, inside, TOLERANCE[dtype])  # the same sums, maybe in another order


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_under_x64(backend, rng, dtype):
    """float32 stays float32; float64 is a compute type where a backend has it, or refused."""
    arrays, options = small_problem(rng), {"kv_length": np.array([60, 3])}
    needs(backend, "kv_length", dtype)
    with jax.enable_x64(True):
        if backend != "xla" and (dtype == "float64" or "splash" in backend):
            with pytest.raises(NotImplementedError, match="float64"):
                run(arrays, options, backend, dtype, False)
            return
        q, k, v = cast(arrays, dtype).values()
        z = attend({"q": q, "k": k, "v": v}, **options, backend=backend)
        got = run(arrays, options, backend, dtype, False)
    assert z.dtype == dtype
    tolerance = TOLERANCE["float32"] if dtype == "float32" else 1e-14  # of float64, 1e-16 each
    assert_close(got, reference(arrays, options, False), tolerance)


def test_queries_wider_than_keys(backend, rng):
    """A bfloat16 block read by float32 queries, as a cache may be."""
    needs(backend, "mixed dtypes")
    arrays = small_problem(rng)
    q, k, v = (jnp.asarray(arrays[name], jnp.bfloat16) for name in ("q", "k", "v"))
    options = {"q_positions": np.arange(20, 70)[None]}
    z = attend({"q": q.astype(jnp.float32), "k": k, "v": v}, **options, backend=backend)
    assert z.dtype == jnp.float32
    exact = {"q": q, "k": k, "v": v}
    exact = {name: np.asarray(x, np.float64) for name, x in exact.items()}
    assert_close(z, reference(exact, options, False)[1][0], TOLERANCE["bfloat16"])


def test_documents_packed_in_a_row_equal_documents_apart(backend, rng):
    needs(backend, "q_starts")
    lengths = [17, 16, 17]
    arrays = {n: x[:1] for n, x in small_problem(rng, 50, 50).items()}
    ids = np.repeat([7, 2, 9], lengths)[None]  # in no order
    arrays = cast(arrays, jnp.float32)
    packed = attend(arrays, segments=ids, backend=backend)
    pair = attend(arrays, segments=(ids, ids), backend=backend)
    np.testing.assert_array_equal(packed, pair)
    ends = np.cumsum(lengths)
    for begin, end in zip(ends - lengths, ends, strict=True):
        alone = {name: np.asarray(x)[:, begin:end] for name, x in arrays.items()}
        # The same numbers, summed in tiles that begin elsewhere.
        np.testing.assert_allclose(
            np.asarray(packed)[:, begin:end], attend(alone, backend="reference"), atol=1e-5
        )


def test_a_query_and_a_sink_that_see_nothing(backend, rng):
    """A sink of -inf is no sink: a query that reads nothing else gives zeros, not nan."""
    needs(backend, "sinks", "q_positions")
    arrays = small_problem(rng) | {"sinks": np.array([-np.inf, 0, -np.inf, 1])}
    options = {"q_positions": np.arange(50)[None] - 3}
    want = reference(arrays, options, False)
    assert np.isfinite(want[0]["sinks"]).all()
    assert_close(run(arrays, options, backend, "float32", False), want, TOLERANCE["float32"])


def test_a_wide_soft_cap_keeps_the_digits(backend, rng):
    needs(backend, "soft_cap", "q_positions")
    arrays, options = small_problem(rng), {"soft_cap": 1e5, "q_positions": np.arange(50)[None]}
    want = reference(arrays, options, False)
    assert_close(run(arrays, options, backend, "float32", False), want, TOLERANCE["float32"])


def test_numbers_of_numpy_and_lists(backend, rng):
    needs(backend, "q_positions", "soft_cap", "sinks")
    arrays = cast(small_problem(rng, T=3, S=5), "float32")
    want = attend(
        arrays,
        window=2,
        soft_cap=3.0,
        scale=0.5,
        sinks=jnp.zeros(4),
        q_positions=jnp.array([[2, 3, 4]]),
        backend=backend,
    )
    got = attend(
        arrays,
        window=np.int64(2),
        soft_cap=np.float32(3),
        scale=np.float32(0.5),
        sinks=[0.0] * 4,
        q_positions=[[2, 3, 4]],
        backend=backend,
    )
    np.testing.assert_array_equal(got, want)


def test_positions_at_the_ends_of_their_types(backend, rng):
    needs(backend, "q_positions")
    arrays = cast(small_problem(rng, T=3, S=5), "float32")
    ends = attend(arrays, q_positions=np.full((1, 3), 2**31 - 1), backend=backend)
    every = attend(arrays, q_positions=np.full((1, 3), 4), backend=backend)
    np.testing.assert_allclose(ends, every, atol=1e-6)  # the last bit may go either way
    unsigned = jnp.arange(3, dtype=jnp.uint32)[None]
    causal = attend(arrays, q_positions=unsigned, backend=backend)
    signed = attend(arrays, q_positions=unsigned.astype(jnp.int32), backend=backend)
    np.testing.assert_array_equal(causal, signed)


def test_positions_that_do_not_fit_int32_are_the_last_one():
    """2**40 is no position of a key, and must not wrap around to one."""
    x = jnp.ones((1, 2, 1, 8))
    far = attention(x, x, x, q_positions=np.array([[0, 2**40]]), backend="xla")
    np.testing.assert_array_equal(far, x)
    z = attention(x, x, x, q_positions=np.array([[0, -(2**40)]]), backend="xla")
    np.testing.assert_array_equal(z[0, :, 0, 0], [1, 0])


def test_a_document_without_keys_reads_nothing():
    x = jnp.ones((1, 3, 1, 8))
    z = attention(x, x, x, segments=(jnp.array([[1, 1, 2]]), jnp.array([[1, 1, 1]])), backend="xla")
    np.testing.assert_array_equal(z[0, :, 0, 0], [1, 1, 0])


LIMITS = {
    "value size": ({"v": np.zeros((2, 70, 2, 24), np.float16)}, "must have one size"),
    "alibi": ({"alibi": np.ones(4)}, "it has no ALiBi"),
    "kv_positions": ({"kv_positions": np.arange(70)[None]}, "it has no positions of keys"),
    "lse": ({"return_lse": True}, "it does not give the log-sum-exp"),
    "q_positions": ({"q_positions": np.arange(50)[None] + 1}, "it needs positions 0..T-1 known"),
    "kv_length": ({"kv_length": 60}, "it needs positions 0..T-1 known"),
    "q_starts": ({"q_starts": np.zeros((1, 50), int)}, "it has no packed documents"),
    "sinks": ({"sinks": np.zeros(4)}, "it has no sinks"),
    "soft_cap": ({"soft_cap": 2.0}, "it has no soft cap"),
    "float32": ({"q": np.zeros((2, 50, 4, 32), np.float32)}, "it takes float16 and bfloat16 only"),
    "mixed dtypes": ({"q": jnp.zeros((2, 50, 4, 32), jnp.bfloat16)}, "must have one dtype"),
    "window of one query": (
        {"q": np.zeros((2, 1, 4, 32), np.float16), "window": 9},
        "it has no window for a single query",
    ),
}


CASES = [(b, name) for b in ("splash", "cudnn") for name in LIMITS if name in LACKS[b]]


@pytest.mark.parametrize(("backend", "feature"), [*CASES, ("cudnn", "window of one query")])
def test_limits_are_said(backend, feature, rng, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    options, reason = LIMITS[feature]
    arguments = cast(small_problem(rng), precise(backend)) | options
    q = jnp.asarray(arguments.pop("q"))
    result = lambda q: jax.tree.leaves(attention(q, **arguments, backend=backend))[0]
    with (
        target(*TARGETS[backend]),
        pytest.raises(NotImplementedError, match=f"'{backend}': .*{reason}"),
    ):
        jax.eval_shape(jax.grad(lambda q: result(q).sum()), q)


X = np.zeros((2, 4, 3, 8), np.float32)
WRONG = {
    "k, v of another shape": ({"q": X[0]}, r"attention takes q \[B, T, N, H\]"),
    "no tokens": ({"q": X[:, :0]}, "none of them empty"),
    "v of another length": ({"v": X[:, :3]}, r"v \[B, S, K, Hv\]"),
    "heads": ({"k": X[:, :, :2], "v": X[:, :, :2]}, "3 query heads cannot share 2"),
    "backend": ({"backend": "abacus"}, "'abacus' does not exist; choose one of auto"),
    "positions": ({"q_positions": np.zeros(4, int)}, r"it must be \[2, 4\], or \[1, 4\]"),
    "starts": ({"q_starts": np.zeros((2, 3), int)}, r"q_starts has shape \(2, 3\)"),
    "key positions": ({"kv_positions": np.zeros((3, 4), int)}, r"kv_positions has shape \(3, 4\)"),
    "lengths": ({"kv_length": np.zeros(3, int)}, r"kv_length holds int\d+ of shape \(3,\)"),
    "sinks": ({"sinks": np.zeros(2)}, r"sinks has shape \(2,\); it must be \[N=3\]"),
    "window": ({"window": 0}, "window=0; it must be at least 1"),
    "scale": ({"scale": 0.0}, "scale=0.0; it must be a number above 0"),
    "scale without an end": ({"scale": np.inf}, "scale=inf; it must be a number above 0"),
    "soft cap": ({"soft_cap": 0.0}, "soft_cap=0.0; it must be a number above 0"),
    "one array of segments": ({"q": X[:, :3], "segments": np.zeros((1, 4), int)}, "give a pair"),
    "segments": ({"segments": np.zeros((1, 5), int)}, r"segments of queries has shape \(1, 5\)"),
    "segments and starts": (
        {"segments": np.zeros((1, 4), int), "q_starts": np.zeros((1, 4), int)},
        "give only one of them",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_is_refused(wrong):
    changes, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        attention(**({"q": X, "k": X, "v": X} | changes))


def test_wrong_numbers_are_refused():
    with pytest.raises(TypeError, match=r"q_positions holds float\d+; they must be integers"):
        attention(X, X, X, q_positions=np.zeros((1, 4)))
    with pytest.raises(TypeError, match="q holds int32"):
        attention(X.astype(np.int32), X, X)
    with pytest.raises(TypeError, match="k is a list; attention takes arrays"):
        attention(X, X.tolist(), X)
    with pytest.raises(TypeError, match=r"window=2.5; it must be an integer, or None"):
        attention(X, X, X, window=2.5)
