"""A token's product: the same bits under any vmap, with the derivatives of a plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.numerics.products import exact_dot


@pytest.fixture
def operands(rng):
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 5, 48), (48, 20))]


def test_any_vmap_gives_the_same_bits(operands):
    x, w = operands
    over = jax.vmap(exact_dot, in_axes=(0, None))
    many = jax.jit(jax.vmap(over, in_axes=(0, None)))(x, w)
    np.testing.assert_array_equal(jax.jit(over)(x[1], w), many[1])
    np.testing.assert_array_equal(jax.jit(exact_dot)(x[2, 3], w), many[2, 3])
    swapped = jax.vmap(jax.vmap(exact_dot, in_axes=(0, None)), in_axes=(1, None), out_axes=1)
    np.testing.assert_array_equal(jax.jit(swapped)(x, w), many)


def test_several_matrices(operands):
    x, w = operands
    both = jnp.stack([w, 2 * w])
    shared = jax.vmap(exact_dot, in_axes=(None, 0))(x[0, 0], both)
    own = jax.vmap(exact_dot)(x[:2, 0], both)
    np.testing.assert_array_equal(shared[1], 2 * shared[0])
    np.testing.assert_array_equal(own[0], exact_dot(x[0, 0], w))


def test_derivatives_are_those_of_a_plain_product(operands):
    x, w = operands
    loss = lambda dot: lambda x, w: jnp.sin(jax.vmap(dot, in_axes=(0, None))(x, w)).sum()
    gradients = [jax.grad(loss(dot), (0, 1))(x[0], w) for dot in (exact_dot, jnp.dot)]
    for exact, plain in zip(*gradients, strict=True):
        # Sums of 48 terms in float32 differ by 1e-5 or so; a wrong derivative by its own size.
        np.testing.assert_allclose(exact, plain, rtol=0, atol=1e-3)
    tangent = jax.jvp(lambda x: exact_dot(x, w), (x[0, 0],), (x[0, 1],))[1]
    np.testing.assert_allclose(tangent, x[0, 1] @ w, rtol=0, atol=1e-3)


def test_half_precision_is_summed_in_float32(operands):
    x, w = (x.astype(jnp.bfloat16) for x in operands)
    y = exact_dot(x[0, 0], w)
    expected = np.asarray(x[0, 0], np.float64) @ np.asarray(w, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-8, atol=1e-6)
