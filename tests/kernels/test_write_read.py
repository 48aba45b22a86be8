"""The instruction on every backend: blocks of every layout, one token and several, rings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.options import Options
from kernels.write_read import write_read

B, L, S, N, K, H = 2, 3, 24, 4, 2, 32
LAYOUTS = {"": None, "B": None, "L": 1, "BL": 2}  # axes in front of [K, S, H]: the layer that runs
# splash has no way of its own to run one token, so blocks do not meet it as they lie.
CASES = [(b, x) for b in ("xla", "triton_interpret", "triton") for x in LAYOUTS] + [
    (b, "BL") for b in ("splash_interpret", "splash")
]


def expected(keys, values, layer, position, k, v, q, options):
    """Blocks and z, by cells one after the other and the formula over positions."""
    keys, values, z = np.array(keys), np.array(values), np.zeros(q.shape)
    for b, t in np.ndindex(q.shape[:2]):
        i = position[b, t]
        if i < 0:
            continue
        index = (b,) * (keys.ndim - 3 - (layer is not None)) + (() if layer is None else (layer,))
        keys[index][:, i % S], values[index][:, i % S] = k[b, t], v[b, t]
        seen = np.arange(0 if options.window is None else max(0, i - options.window + 1), i + 1)
        for n in range(N):
            block = n // (N // K)
            scores = keys[index][block, seen % S].astype(np.float64) @ q[b, t, n] * options.scale
            weights = np.exp(scores - scores.max())
            z[b, t, n] = weights / weights.sum() @ values[index][block, seen % S]
    return keys, values, z


@pytest.mark.parametrize(("backend", "layout"), CASES)
@pytest.mark.parametrize(("T", "window"), [(1, None), (1, S), (5, None), (5, S)])
def test_writes_and_reads_like_the_formula(backend, layout, T, window):
    x = jnp.zeros((1, 2, 1, 32))
    try:
        jax.eval_shape(lambda x: attention(x, x, x, backend=backend), x)
    except NotImplementedError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng()
    rows = B if "B" in layout else 1
    shape = ((B,) if "B" in layout else ()) + ((L,) if "L" in layout else ()) + (K, S, H)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    blocks = normal(*shape), normal(*shape)
    k, v, q = normal(rows, T, K, H), normal(rows, T, K, H), normal(rows, T, N, H)
    # A ring has wrapped around, and does so again within the chunk.
    start = rng.integers(S + S - 3, S + S + 3, rows) if window else rng.integers(0, S - T, rows)
    cells = (start[:, None] + np.arange(T)).astype(np.int32)
    if rows > 1:
        cells[1, -1] = -1  # padding
    options = Options(H**-0.5, window)
    layer = LAYOUTS[layout]
    step = jax.jit(write_read, static_argnames=("options", "backend"))
    got = step(*blocks, layer, cells, None, k, v, q, None, None, options=options, backend=backend)
    want = expected(*blocks, layer, cells, k, v, q, options)
    for x, y in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(got[2], want[2], atol=1e-5)  # float32 sums of some dozen products


def test_auto_refuses_nothing_that_one_token_needs(monkeypatch):
    """A backend without a way of its own to run one token is passed over, when it may be."""
    monkeypatch.setattr("kernels.backends.choice.AUTO", {"cpu": ("splash_interpret", "xla")})
    block, x = jnp.zeros((K, S, H)), jnp.zeros((1, 1, K, H))
    cells = jnp.zeros((1, 1), jnp.int32)
    options = Options(1.0)
    step = lambda *a: write_read(*a, None, None, options=options, backend="auto")
    jaxpr = str(jax.make_jaxpr(step)(block, block, None, cells, None, x, x, x))
    assert "pallas_call" not in jaxpr
