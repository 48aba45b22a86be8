"""Many queries at once, on a CPU: the bits of one query alone, and of exact numerics elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import Blocks
from kernels.cpu import attention
from kernels.cpu.many_queries import attend, can_attend
from kernels.dot import has_kernel
from kernels.exact import attention as exact
from kernels.operands import Shared, Where
from kernels.options import Options

pytestmark = pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")

# B, T, K, G, S, H, Hv: few, since each is compiled.
SHAPES = [(2, 3, 1, 1, 5, 8, 8), (2, 40, 2, 3, 300, 16, 24), (1, 300, 1, 1, 700, 72, 136)]
run = jax.jit(attend, static_argnums=4)
one = jax.jit(attention.read, static_argnums=4)
elsewhere = jax.jit(exact.forward, static_argnums=4)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_query_reads_what_it_reads_alone(seed):
    rng = np.random.default_rng(seed)
    B, T, K, G, S, H, Hv = SHAPES[rng.integers(len(SHAPES))]
    layers = [(), (2,)][rng.integers(2)]
    dtype = ["float32", "bfloat16"][rng.integers(2)]
    # Of NumPy, whose slices are not compiled.
    array = lambda *shape: rng.standard_normal(shape).astype(jnp.dtype(dtype))
    keys, values = array(B, *layers, K, S, H), array(B, *layers, K, S, Hv)
    q, sinks = array(B, T, K * G, H), [None, array(K * G)][rng.integers(2)]
    # Anywhere, beyond the last cell too; where they are negative, padding.
    positions = rng.integers(-2, S + 2, (B, T)).astype(np.int32)
    blocks = Blocks((keys, values), jnp.int32(1) if layers else None, batched=True)
    cap, is_exact = [None, 1.5][rng.integers(2)], bool(rng.integers(2))
    options = Options(H**-0.5, [None, 20][rng.integers(2)], cap, is_exact)
    slopes = [None, rng.random(K * G, "float32") / 64][rng.integers(2)]
    shared, where = Shared(sinks, slopes), Where(positions)
    assert can_attend(q, blocks, where, shared, options)
    z, lse = map(np.asarray, run(q, blocks, where, shared, options))
    assert z.dtype == dtype and lse.dtype == np.float32
    for t in rng.integers(0, T, 5):
        alone = one(blocks, positions[:, t : t + 1], q[:, t : t + 1], shared, options)
        np.testing.assert_array_equal(z[:, t], np.asarray(alone)[:, 0])
    # The log-sum-exp, in float64; in float32 scores of size 5 err by some 1e-6.
    t, scores = rng.integers(T), []
    wide = np.asarray(keys[:, 1] if layers else keys, np.float64).repeat(G, 1)
    scores = np.einsum("bnh,bnsh->bns", np.asarray(q[:, t], np.float64), wide) * H**-0.5
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    distance = positions[:, t, None] - np.arange(S)
    if slopes is not None:
        scores -= np.float64(slopes)[:, None] * distance[:, None]
    seen = (distance >= 0) & (distance < (options.window or S + 3)) & (positions[:, t, None] >= 0)
    total = np.where(seen[:, None], np.exp(scores), 0).sum(-1)
    total += (0 if sinks is None else np.exp(np.float64(sinks))) * (total > 0)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse[:, t], np.log(total), rtol=0, atol=2e-5)


@settings(max_examples=8)  # of four programs
@given(seed=st.integers(0, 2**32 - 1))
def test_documents(seed):
    """Queries of packed documents have the bits that exact numerics have elsewhere."""
    rng = np.random.default_rng(seed)
    T = 300
    starts = np.sort(rng.integers(0, T, (2, 5))) * [[0, 1, 1, 1, 1]]
    # What is left of a sequence in the cells of a ring begins before them.
    starts[:, 0] -= rng.integers(0, 600, 2) * rng.integers(2)
    which = (np.arange(T)[:, None] >= starts[:, None]).sum(-1) - 1
    where = Where(np.arange(T, dtype=np.int32)[None], None, np.take_along_axis(starts, which, 1))
    keys, values, q = (rng.standard_normal(s) for s in ((2, 2, T, 16), (2, 2, T, 8), (2, T, 4, 16)))
    blocks = Blocks((np.float32(keys), np.float32(values)), batched=True)
    cap, slopes = [(None, None), (0.7, rng.random(4, "float32"))][rng.integers(2)]
    options = Options(0.25, [None, 30][rng.integers(2)], cap, exact=True)
    shared = Shared(alibi=slopes)
    assert can_attend(np.float32(q), blocks, where, shared, options)
    made = run(np.float32(q), blocks, where, shared, options)
    expected = elsewhere(np.float32(q), blocks, where, shared, options)
    jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_what_is_no_number_shows(rng):
    keys, values = (jnp.asarray(rng.standard_normal((1, 1, 24, 8)), jnp.float32) for _ in range(2))
    q, where = jnp.ones((1, 24, 1, 8)), Where(np.arange(24, dtype=np.int32)[None])
    reads = lambda *block: run(q, Blocks(block, batched=True), where, Shared(), Options(0.5))[0]
    for bad in (reads(keys.at[0, 0, 8].set(jnp.nan), values), reads(keys, values * jnp.nan)):
        assert np.isnan(bad[:, 8:]).all()
    np.testing.assert_array_equal(
        reads(keys.at[0, 0, 8].set(jnp.nan), values)[:, :8], reads(keys, values)[:, :8]
    )


def test_a_block_without_cells():
    blocks = Blocks((jnp.zeros((1, 1, 0, 8)), jnp.zeros((1, 1, 0, 8))), batched=True)
    z, lse = run(jnp.ones((1, 2, 1, 8)), blocks, Where(jnp.arange(2)[None]), Shared(), Options(1.0))
    assert not z.any() and (lse == -jnp.inf).all()


def test_what_it_does_not_do_it_leaves():
    block, q = jnp.zeros((1, 1, 8, 8)), jnp.zeros((1, 2, 1, 8))
    blocks, where = Blocks((block, block), batched=True), Where(jnp.arange(2)[None])
    assert can_attend(q, blocks, where, Shared(), Options(1.0))
    assert not can_attend(q[:, :1], blocks, where, Shared(), Options(1.0))
    held = Where(jnp.arange(2)[None], jnp.arange(8)[None])
    assert not can_attend(q, blocks, held, Shared(), Options(1.0))
