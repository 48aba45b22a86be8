"""The Triton source of decode, run by the interpreter, against the formula in float64.

These are the tests of decoding and decode_kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backends import reference
from kernels.blocks import Blocks
from kernels.operands import Shared, Where
from kernels.options import Options

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.backends.triton import interpret

# As for attend: rounding of inputs, weights and results, of values of about 1.
TOLERANCE = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2.5e-2}


def in_float64(x):
    return None if x is None else np.asarray(x, np.float64)


def expected(blocks, cells, cell, q, shared, options):
    """The blocks with the new cells, and z in float64, by the dense formula over positions."""
    (keys, values), layer, (k, v) = map(np.array, blocks.arrays), blocks.layer, cell
    size = keys.shape[3]
    ring = options.window == size
    held = np.full((len(cells), size), -1, np.int32)
    for b, (cell,) in enumerate(cells):
        if cell < 0:
            continue
        keys[b, layer, :, cell % size], values[b, layer, :, cell % size] = k[b, 0], v[b, 0]
        past = np.arange(max(0, cell - size + 1) if ring else 0, cell + 1)
        held[b, past % size] = past
    with jax.enable_x64(True):
        z, _ = jax.jit(reference.attend, static_argnames="options")(
            in_float64(q),
            in_float64(keys[:, layer]),
            in_float64(values[:, layer]),
            Where(cells, held),
            Shared(in_float64(shared.sinks), in_float64(shared.alibi)),
            options=options,
        )
        return keys, values, np.asarray(z)


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    B, L, K = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 2))
    # 40 heads of 256 take two programs.
    N = K * draw(st.sampled_from([1, 3, 20, 40]))
    size, H = draw(st.integers(1, 150)), draw(st.sampled_from([32, 40, 256]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    window = draw(st.sampled_from([None, size, 20]))
    last = 3 * size if window == size else size
    cells = rng.integers(0, last, (B, 1)).astype(np.int32)
    cells[rng.random((B, 1)) < 0.2] = -1

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    HV = draw(st.sampled_from([H, 24, 64]))
    arrays = normal(B, L, K, size, H), normal(B, L, K, size, HV)
    operands = (
        Blocks(arrays, int(rng.integers(L)), batched=True),
        cells,
        (normal(B, 1, K, H), normal(B, 1, K, HV)),
        normal(B, 1, N, H),
        Shared(
            normal(N, dtype=jnp.float32) if draw(st.booleans()) else None,
            rng.uniform(0.01, 0.5, N).astype(np.float32) if draw(st.booleans()) else None,
        ),
    )
    soft_cap = draw(st.sampled_from([None, 2.0]))
    return operands, Options(scale=H**-0.5, window=window, soft_cap=soft_cap)


@settings(max_examples=12)
@given(cases())
def test_equals_the_formula_in_float64(case):
    operands, options = case
    run = jax.jit(interpret.decode, static_argnames="options")
    (keys, values), z = run(*operands, options=options)
    want_keys, want_values, want = expected(*operands, options)
    # One cell of one layer of each row changed, and nothing else, to the bit.
    np.testing.assert_array_equal(np.asarray(keys), want_keys)
    np.testing.assert_array_equal(np.asarray(values), want_values)
    scale = max(1, np.abs(want).max())
    tolerance = TOLERANCE[str(z.dtype)] * scale
    np.testing.assert_allclose(in_float64(z), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [None, 40])
def test_token_by_token_equals_all_at_once(rng, window):
    """A scan over decode steps, from an empty block of garbage, gives what one attend gives."""
    B, T, N, K, H = 2, 70, 4, 2, 32
    q = jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((B, T, K, H)), jnp.float32) for _ in range(2))
    options = Options(H**-0.5, window)
    positions = jnp.arange(T)[None]
    where, shared = Where(positions), Shared()
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    want, _ = interpret.attend(q, keys, values, where, shared, options=options)

    @jax.jit
    def generate(arrays):
        def step(arrays, i):
            *cell, q_i = (jax.lax.dynamic_slice_in_dim(x, i, 1, 1) for x in (k, v, q))
            blocks = Blocks(arrays, 0, batched=True)
            arrays, z = interpret.decode(
                blocks, i[None, None], tuple(cell), q_i, shared, options=options
            )
            return arrays, z[:, 0]

        return jax.lax.scan(step, arrays, jnp.arange(T))

    garbage = jnp.full((B, 1, K, 100 if window is None else window, H), jnp.nan)
    _, z = generate((garbage, garbage))
    # Both are float32 sums of the same numbers in another order.
    np.testing.assert_allclose(z.swapaxes(0, 1), want, rtol=0, atol=5e-6)
