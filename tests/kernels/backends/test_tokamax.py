"""What tokamax is told, against the formula: its own dense op stands in for the kernel here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.backends import reference
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.target import target

pytest.importorskip("tokamax", reason="tokamax is not installed: it needs Python 3.12")

from tokamax._src.ops.attention.base import DotProductAttention

from kernels.backends import tokamax

H = 32


def operands(rng, T=20, S=30, N=4, K=2):
    shapes = (2, T, N, H), (2, K, S, H), (2, K, S, H)
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients_equal_the_formula(rng, window, soft_cap, packed):
    """Positions beyond the block, padding, windows and documents; some queries read nothing."""
    arrays = operands(rng)
    positions = np.stack([np.arange(20), np.arange(20) + 14]).astype(np.int32)
    positions[0, 15:] = -1
    starts = positions // 7 * 7 if packed else None
    where, options = Where(jnp.asarray(positions), q_starts=starts), Options(0.3, window, soft_cap)

    def gradients(attend, *arrays):
        def loss(*arrays):
            z = attend(*arrays, where, Shared(), options=options)[0].astype(jnp.float32)
            return jnp.sin(z).sum(), z

        return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)

    with target("gpu", 90):
        run = lambda *x, **options: tokamax.attend(*x, **options, op=DotProductAttention())
        got = gradients(run, *arrays)
    want = gradients(reference.attend, *(x.astype(jnp.float32) for x in arrays))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Weights, results and gradients of bfloat16: 8 bits.
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-2 * max(1, np.abs(y).max()))


LIMITS = {
    "it has no sinks": {"shared": Shared(sinks=np.zeros(4))},
    "it has no ALiBi": {"shared": Shared(alibi=np.ones(4))},
    "it has no positions of keys": {
        "where": Where(*[np.zeros((1, n), np.int32) for n in (20, 30)])
    },
    "it takes float16 and bfloat16 only": {"q": jnp.zeros((2, 20, 4, H))},
    "it runs on compute capability 9.0 and 10.0; got 8.0": {"on": 80},
}


@pytest.mark.parametrize("reason", LIMITS)
def test_what_it_cannot_do_is_said(rng, reason):
    q, keys, values = operands(rng)
    where = Where(np.arange(20, dtype=np.int32)[None])
    given = {"q": q, "where": where, "shared": Shared(), "on": 90} | LIMITS[reason]
    with target("gpu", given["on"]), pytest.raises(NotImplementedError, match=reason):
        tokamax.attend(
            given["q"], keys, values, given["where"], given["shared"], options=Options(1.0)
        )
