"""Attention with the cells split, run by the interpreter: bits that nothing beside a query changes.

These are the tests of splitting and split_kernels in exact numerics. That few queries read what the
formula says is tested in tests/kernels/test_attention.py, and that blocks are read in place in
tests/kernels/test_write_read.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backends import choice, reference
from kernels.blocks import Blocks
from kernels.operands import Shared, Where
from kernels.options import Options
from transformer.config import Config
from transformer.modes.schedule import run
from transformer.program.init import init_cache, init_params
from transformer.program.program import program

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.backends.triton import interpret, launches, splitting

T, N, K, H = 70, 4, 2, 32
BEFORE, CAPACITY = 13, 150


@pytest.fixture(autouse=True, scope="module")
def small_splits():
    """70 cells lie in three splits, of two tiles each; more than eight queries are many."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tile = launches.Launch(16, 16, 4, 1)
        monkeypatch.setitem(launches._INTERPRETED, "split", tile)
        monkeypatch.setattr(splitting, "EXACT_SPLIT", 32)
        monkeypatch.setattr(splitting, "FEW", 8)
        yield


@st.composite
def sequences(draw):
    """Queries, keys and values of one sequence, what they share, and options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    normal = lambda *shape: jnp.asarray(rng.standard_normal((1, *shape)), dtype)
    maybe = lambda x: x if draw(st.booleans()) else None
    shared = Shared(maybe(jnp.asarray(rng.standard_normal(N), "float32")), maybe(np.full(N, 0.1)))
    options = Options(0.2, draw(st.sampled_from([None, 20])), maybe(3.0), exact=True)
    return normal(T, N, H), normal(K, T, H), normal(K, T, H), shared, options


def attend(q, keys, values, where, shared, options):
    run = jax.jit(lambda *operands: interpret.attend(*operands, options=options))
    return run(q, keys, values, where, shared)


@settings(max_examples=2)
@given(sequence=sequences(), t=st.integers(0, T - 6), seed=st.integers(0, 2**32))
def test_a_query_reads_the_same_bits_however_it_runs(sequence, t, seed):
    """Among many and among few, with more cells, behind another document, and in place."""
    q, keys, values, shared, options = sequence
    positions, few = jnp.arange(T)[None], slice(t, t + 5)
    z, lse = attend(q, keys, values, Where(positions), shared, options)
    others = np.random.default_rng(seed).standard_normal((1, K, CAPACITY, H))

    def among(x, at):
        """The cells of x at a place in a block that holds other numbers."""
        block = jnp.asarray(others, x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(block, x, at, 2)

    def assert_same(results, tokens):
        for x, y in zip(results, (z, lse), strict=False):
            np.testing.assert_array_equal(x, y[:, tokens])

    where = Where(positions[:, few])
    blocks = among(keys, 0), among(values, 0)
    assert_same(attend(q[:, few], *blocks, where, shared, options), few)

    cells = positions + BEFORE
    starts = jnp.full_like(cells, BEFORE)
    blocks = among(keys, BEFORE), among(values, BEFORE)
    assert_same(attend(q, *blocks, Where(cells, q_starts=starts), shared, options), slice(None))

    size = options.window or CAPACITY  # a ring, where there is a window
    cell = tuple(x[:, :, t : t + 1].swapaxes(1, 2) for x in (keys, values))
    held = t - 1 - (t - 1 - np.arange(size)) % size if options.window else np.arange(size)
    take = lambda x: jnp.where(
        (held[:, None] >= 0) & (held[:, None] < t), x[:, :, np.clip(held, 0, T - 1)], 7
    )
    blocks = Blocks((take(keys), take(values)), batched=True)
    step = jax.jit(lambda *operands: interpret.decode(*operands, options=options))
    _, one = step(blocks, jnp.full((1, 1), t), cell, q[:, t : t + 1], shared)
    assert_same([one], slice(t, t + 1))


def test_it_is_the_formula_to_rounding(rng):
    q, keys, values = (
        jnp.asarray(rng.standard_normal((1, *s, H))) for s in ((T, N), (K, T), (K, T))
    )
    operands = q, keys, values, Where(jnp.arange(T)[None]), Shared()
    got = attend(*operands, Options(0.2, exact=True))
    want = reference.attend(*operands, options=Options(0.2))
    for x, y in zip(got, want, strict=True):
        # float32 sums of the same numbers in another order
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6)


def test_what_would_not_have_the_same_bits_in_place_is_refused():
    options, where = Options(1.0, exact=True), Where(jnp.zeros((1, 1), jnp.int32))
    x = jnp.zeros((1, 1, 1, 32))
    for operands in ((x.astype("bfloat16"), x, x, where), (*[x[..., :20]] * 3, where)):
        with pytest.raises(NotImplementedError, match="queries of the blocks' dtype, and heads of"):
            interpret.attend(*operands, Shared(), options=options)
    where = Where(where.q_positions, kv_positions=where.q_positions)
    with pytest.raises(NotImplementedError, match="have no positions of keys"):
        interpret.attend(x, x, x, where, Shared(), options=options)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_the_same_bits_however_it_runs(dtype, monkeypatch):
    """Products and attention by the kernels; a ring beside a layer that sees all."""
    monkeypatch.setattr(choice, "AUTO", {"cpu": ("triton_interpret",)})
    config = Config(
        vocab_size=60,
        max_length=64,
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        window=(12, None),
        dtype=dtype,
    )
    f, params = program(config, numerics="exact"), init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (40,), 0, 60)

    def logits(capacity, chunk):
        cache = init_cache(config, capacity)
        return jax.jit(lambda params: run(f, params, cache, tokens, chunk=chunk)[1])(params)

    expected = logits(40, None)
    for capacity, chunk in ((64, 17), (40, 1)):
        np.testing.assert_array_equal(logits(capacity, chunk), expected)
