"""Reading blocks where they lie, on a CPU, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import Blocks
from kernels.cells import ring_positions
from kernels.cpu.attention import can_read, read
from kernels.cpu.call import is_available
from kernels.operands import Shared
from kernels.options import Options

pytestmark = pytest.mark.skipif(not is_available(), reason="kernels of a CPU, with multiply-adds")


def formula(keys, values, i, q, sinks, slopes, options):
    """Of one sequence, in float64: keys [K, S, H], values [K, S, Hv], q [N, H] -> [N, Hv]."""
    window, cap = options.window, options.soft_cap
    K, S = keys.shape[:2]
    held = np.arange(S) if window != S else np.asarray(ring_positions(np.array([[i]]), S))[0]
    seen = (held >= 0) & (held <= i) & (held > i - (window or S + i + 1))
    if not seen.any():
        return np.zeros((len(q), values.shape[-1]))
    heads = np.repeat(np.arange(K), len(q) // K)
    scores = np.einsum("nh,nsh->ns", q, keys[heads])[:, seen] * options.scale
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    scores = scores if slopes is None else scores - slopes[:, None] * (i - held[seen])
    sinks = np.full((len(q), 1), -np.inf) if sinks is None else sinks[:, None]
    scores = np.concatenate([scores, sinks], 1)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = (weights / weights.sum(1, keepdims=True))[:, :-1]
    return np.einsum("ns,nsh->nh", weights, values[heads][:, seen])


# B, K, G, S, H, Hv: few, since each is compiled.
SHAPES = [(1, 1, 1, 3, 8, 8), (2, 3, 1, 40, 16, 24), (3, 1, 3, 300, 64, 72), (2, 2, 2, 700, 24, 16)]
run = jax.jit(read, static_argnums=4)


@settings(max_examples=60)  # most are compiled
@given(seed=st.integers(0, 2**32 - 1))
def test_a_query_reads_the_cells_up_to_its_position(seed):
    rng = np.random.default_rng(seed)
    B, K, G, S, H, Hv = SHAPES[rng.integers(len(SHAPES))]
    window = [None, 1, 20, S][rng.integers(4)]
    layers = [(), (2,)][rng.integers(2)]
    dtype = ["float32", "bfloat16", "float16"][rng.integers(3)]
    # Of NumPy, whose slices are not compiled.
    array = lambda *shape: rng.standard_normal(shape).astype(jnp.dtype(dtype))
    keys, values = array(B, *layers, K, S, H), array(B, *layers, K, S, Hv)
    q, sinks = array(B, 1, K * G, H), [None, array(K * G)][rng.integers(2)]
    slopes = [None, rng.random(K * G, "float32") / 64][rng.integers(2)]
    # Beyond the last cell too, where a block that is no ring has nothing more to see.
    i = rng.integers(-1, 2 * S, (B, 1)).astype(np.int32)
    blocks = Blocks((keys, values), jnp.int32(1) if layers else None, batched=True)
    options, shared = Options(H**-0.5, window, [None, 1.5][rng.integers(2)]), Shared(sinks, slopes)
    assert can_read(blocks, q, shared, options)
    z = np.asarray(run(blocks, i, q, shared, options))
    assert z.shape == (B, 1, K * G, Hv) and z.dtype == dtype
    # A float of 11 or 8 bits is rounded once; in float32 sums of 700 terms err by some 1e-6, and
    # so do scores less up to 1400 / 64.
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    wide = lambda x: None if x is None else np.asarray(x, np.float64)
    for b in range(B):
        one = [wide(x[b, 1] if layers else x[b]) for x in (keys, values)]
        expected = formula(*one, i[b, 0], wide(q[b, 0]), wide(sinks), wide(slopes), options)
        np.testing.assert_allclose(wide(z[b, 0]), expected, rtol=tolerance, atol=tolerance)


def test_what_is_not_seen_changes_nothing_and_what_is_no_number_shows(rng):
    keys, values = (jnp.asarray(rng.standard_normal((1, 1, 24, 8)), jnp.float32) for _ in range(2))
    q, i = jnp.ones((1, 1, 1, 8)), np.array([[10]], np.int32)
    options = Options(0.5, window=4)
    reads = lambda *block: run(Blocks(block, batched=True), i, q, Shared(), options)
    z = reads(keys, values)
    for cell in (6, 11):
        unseen = keys.at[0, 0, cell].set(jnp.nan), values.at[0, 0, cell].set(jnp.nan)
        np.testing.assert_array_equal(reads(*unseen), z)
    assert np.isnan(reads(keys.at[0, 0, 8].set(jnp.nan), values)).all()
    assert np.isnan(reads(keys, values.at[0, 0, 8, 0].set(jnp.nan))[..., 0]).all()


def test_what_it_does_not_do_it_leaves():
    block = jnp.zeros((1, 1, 8, 8))
    blocks, q = Blocks((block, block), batched=True), jnp.zeros((1, 1, 1, 8))
    assert can_read(blocks, q, Shared(), Options(1.0))
    no_cells = Blocks((block[..., :0, :], block[..., :0, :]), batched=True)
    assert not can_read(no_cells, q, Shared(), Options(1.0))
    odd = Blocks((block[..., :7], block), batched=True)
    assert not can_read(odd, q[..., :7], Shared(), Options(1.0))
