"""Rows times a matrix: derivatives of every order, mapped and not, are those of a plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.dot import dot, dot_p, has_kernel

pytestmark = pytest.mark.skipif(not has_kernel(), reason="kernels of a CPU, with multiply-adds")


def _plain(x, w, turned, by_output):
    return (x.mT if turned else x) @ (w.mT if by_output else w)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_derivatives(turned, by_output, rng):
    x = rng.standard_normal((2, 50, 9) if turned else (2, 9, 50)).astype(np.float32)
    w = rng.standard_normal((2, 70, 50) if by_output else (2, 50, 70)).astype(np.float32)

    def results(product, x_axis, w_axis):
        """The product's gradients, and how they change, with one operand or both mapped."""
        one = lambda x, w: jnp.sin(product(x, w, turned, by_output)).sum()
        mapped = lambda x, w: jax.vmap(one, (x_axis, w_axis))(x, w).sum()
        operands = x if x_axis == 0 else x[0], w if w_axis == 0 else w[0]
        gradient = jax.grad(mapped, (0, 1))
        inside = jax.vmap(jax.grad(one, (0, 1)), (x_axis, w_axis))(*operands)
        return inside, *jax.jvp(gradient, operands, tuple(0.1 * a for a in operands))

    for axes in [(0, None), (None, 0), (0, 0)]:
        made = jax.jit(results, static_argnums=(0, 1, 2))(dot, *axes)
        with jax.enable_x64(True):
            expected = jax.tree.map(np.asarray, results(_in_float64, *axes))
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
            # 70 products of sums of 50 terms, each sum off by some units of 1e-6.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


def _in_float64(x, w, turned, by_output):
    return _plain(x.astype(jnp.float64), w.astype(jnp.float64), turned, by_output)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_size_and_type(dtype, rng):
    for M, K, N in [(1, 64, 64), (8, 64, 64), (16, 4, 64), (40, 100, 100)]:
        with jax.enable_x64(dtype == "float64"):
            x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((M, K), (K, N)))
            y = dot(x, w)
            assert y.dtype == dtype
            expected = np.float64(x) @ np.float64(w)
        # A result of bfloat16 has 8 bits, so rounding it changes it by 1 / 256 at most.
        relative, absolute = {"float32": (0, 1e-4), "float64": (0, 1e-12)}.get(dtype, (4e-3, 1e-4))
        np.testing.assert_allclose(np.float64(y), expected, rtol=relative, atol=absolute)


def test_tokens_become_rows():
    """Mapped over sequences and positions, all tokens take the matrix together."""
    x, w = jnp.ones((3, 5, 64)), jnp.ones((64, 64))
    run = jax.vmap(jax.vmap(lambda x: dot(x[None], w)[0]))
    shapes = [
        [v.aval.shape for v in eqn.invars]
        for eqn in jax.make_jaxpr(run)(x).jaxpr.eqns
        if eqn.primitive is dot_p
    ]
    assert shapes == [[(15, 64), (64, 64)]]


def test_what_is_not_mapped_is_computed_once():
    x, w = jnp.ones((8, 64)), jnp.ones((64, 64))
    y = jax.vmap(lambda a: a + dot(x, w).sum() + jax.grad(lambda w: dot(x, w).sum())(w).sum())
    np.testing.assert_array_equal(y(jnp.arange(3.0)), jnp.arange(3) + 64 * 8 * 64 + 8 * 64 * 64)
