"""Rows times the matrices of their groups: sums, derivatives of every order, and equal bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dot import has_kernel
from kernels.ragged_dot import in_order, ragged_dot

pytestmark = pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")


def _plain(x, w, sizes):
    """Each row times the matrix of its group, picked for it; zeros for rows of no group."""
    group = np.repeat(np.arange(len(w) + 1), [*sizes, len(x) - sum(sizes)])
    w = jnp.concatenate([w, jnp.zeros_like(w[:1])])
    return jnp.einsum("mk,mkn->mn", x, w[group])


def _operands(rng, sizes, left, K, N):
    x = rng.standard_normal((sum(sizes) + left, K)).astype(np.float32)
    return x, rng.standard_normal((len(sizes), K, N)).astype(np.float32)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 99))
def test_groups_of_all_sizes(sizes, left, seed):
    x, w = _operands(np.random.default_rng(seed), sizes, left, 70, 90)
    y = jax.jit(ragged_dot)(x, w, np.array(sizes, np.int32))
    with jax.enable_x64(True):
        plain = jax.jit(lambda x, w: _plain(x, w, sizes))
        expected = plain(x.astype(np.float64), w.astype(np.float64))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)  # 70 terms of about 1


@pytest.mark.parametrize("mapped", [(None, None), (0, None), (None, 0), (0, 0)])
def test_derivatives(mapped, rng):
    sizes, left = [3, 0, 7], 2
    pairs = [_operands(rng, sizes, left, 33, 70) for _ in range(2)]
    operands = [
        np.stack(a) if dim == 0 else a[0]
        for a, dim in zip(zip(*pairs, strict=True), mapped, strict=True)
    ]

    def results(product, *operands):
        """The gradients of a function of the product, and how they change."""
        one = lambda x, w: jnp.sin(product(x, w)).sum()
        whole = one if mapped == (None, None) else lambda *xw: jax.vmap(one, mapped)(*xw).sum()
        gradient = jax.grad(whole, (0, 1))
        return jax.jvp(gradient, operands, tuple(0.1 * a for a in operands))

    ours = lambda x, w: ragged_dot(x, w, jnp.asarray(sizes, jnp.int32))
    made = jax.jit(lambda *a: results(ours, *a))(*map(jnp.asarray, operands))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in operands]
        expected = jax.jit(lambda *a: results(lambda x, w: _plain(x, w, sizes), *a))(*wide)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        # 70 products of sums of 33 terms, each sum off by some units of 1e-6.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


def test_a_row_has_the_same_bits_in_any_group(rng):
    x, w = _operands(rng, [40], 0, 700, 70)
    alone = [in_order(row[None], w, jnp.array([1], jnp.int32), 512)[0] for row in x]
    for sizes in ([40], [0, 40], [40, 0, 0]):
        of_all = np.broadcast_to(w, (len(sizes), *w.shape[1:]))
        together = in_order(jnp.asarray(x), of_all, jnp.array(sizes, jnp.int32), 512)
        np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types(dtype, rng):
    x, w = (jnp.asarray(a, dtype) for a in _operands(rng, [3, 5], 0, 64, 64))
    sizes = jnp.array([3, 5], jnp.int32)
    y, pull = jax.vjp(lambda x, w: ragged_dot(x, w, sizes), x, w)
    assert y.dtype == dtype
    assert [a.dtype for a in pull(jnp.ones_like(y))] == [dtype, dtype]
    expected = _plain(x.astype(jnp.float32), w.astype(jnp.float32), [3, 5])
    # Rounding to bfloat16, which has 8 bits, changes a number by 1 / 256 of it at most.
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=4e-3, atol=1e-3)
