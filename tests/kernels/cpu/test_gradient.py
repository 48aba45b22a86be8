"""Gradients of many queries, on a CPU, against those of the reference in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backends import reference
from kernels.cpu.gradient import gradients
from kernels.dot import has_kernel
from kernels.operands import Shared, Where
from kernels.options import Options

pytestmark = pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")

run = jax.jit(gradients, static_argnums=8)


@partial(jax.jit, static_argnums=6)
def by_reference(q, keys, values, dz, where, alibi, options):
    """The log-sum-exp, the sums of z dz, and the gradients."""
    attend = lambda *x: reference.attend(*x, where, Shared(alibi=alibi), options=options)
    (z, lse), pull = jax.vjp(attend, q, keys, values)
    return lse, (z * dz).sum(-1), pull((dz, jnp.zeros_like(lse)))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradients_are_those_of_the_reference(seed):
    rng = np.random.default_rng(seed)
    B, T, K, G, S, H, Hv = [(2, 3, 1, 1, 5, 8, 8), (2, 70, 2, 3, 150, 16, 72)][rng.integers(2)]
    shapes = (B, T, K * G, H), (B, S, K, H), (B, S, K, Hv), (B, T, K * G, Hv)
    q, keys, values, dz = (np.float32(rng.standard_normal(shape)) for shape in shapes)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    # Anywhere, beyond the last cell too; where they are negative, padding.
    positions = rng.integers(-2, S + 2, (B, T)).astype(np.int32)
    starts = [None, np.int32(positions - rng.integers(0, S, (B, T)))][rng.integers(2)]
    where = Where(positions, None, starts)
    # Caps so low that their slope is far from 1.
    options = Options(H**-0.5, [None, 20][rng.integers(2)], [None, 0.7][rng.integers(2)])
    alibi = [None, rng.random(K * G, "float32") / 4][rng.integers(2)]
    with jax.enable_x64(True):
        wide = (np.float64(x) for x in (q, keys, values, dz))
        lse, delta, expected = by_reference(*wide, where, alibi, options)
    lse, delta = np.float32(lse), np.float32(delta)
    made = run(q, keys, values, dz, lse, delta, where, alibi, options)
    for x, y in zip(made, expected, strict=True):
        # Sums of some hundred products, each rounded by 6e-8 of a weight times a gradient.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()))
