"""Primitives whose batching rule is ours; what is built on them is tested where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.tracing import primitive


def scaled(x, n, *, factor):
    return [jnp.sin(x) * factor, n + 1]


def batch(axis, operands, dims, *, factor):
    """Along the axis "shared" all see the first; along any other, each sees its own."""
    x, n = operands
    if axis.name == "shared":
        x = jax.lax.index_in_dim(x, 0, dims[0], keepdims=False)
        return scaled_p.bind(x, n, factor=factor), [None, None]
    x = jnp.moveaxis(x, dims[0], 0)
    return scaled_p.bind(x, n, factor=factor), [0, None]


scaled_p = primitive.define("scaled", scaled, batch)


def first(x, factor=3.0):
    return scaled_p.bind(x, jnp.int32(1), factor=factor)[0]


X = jnp.arange(6.0).reshape(2, 3)


def test_it_means_what_its_function_means():
    want, one = scaled(X, jnp.int32(1), factor=2.0)
    for run in (scaled_p.bind, jax.jit(scaled_p.bind, static_argnames="factor")):
        got, two = run(X, jnp.int32(1), factor=2.0)
        np.testing.assert_array_equal(got, want)
        assert two == one


def test_it_stands_in_the_jaxpr_under_its_name():
    assert [e.primitive.name for e in jax.make_jaxpr(first)(X).eqns] == ["scaled"]


def test_vmap_means_what_the_rule_says():
    np.testing.assert_array_equal(jax.vmap(first, 1, 1)(X), first(X))
    shared = jax.vmap(first, axis_name="shared")(X)
    np.testing.assert_array_equal(shared, jnp.stack([first(X[0])] * 2))


@pytest.mark.parametrize("jit", [False, True])
def test_derivatives_are_those_of_the_function(jit):
    """In both modes, and twice; the integer has none."""
    hessian = lambda f: lambda x: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (x,))
    run = jax.jit(hessian(first)) if jit else hessian(first)
    got, want = run(X), hessian(lambda x: jnp.sin(x) * 3.0)(X)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)


def test_a_rule_for_tangents_gets_only_what_moves():
    """The second operand has no tangent, so that the rule is given that of the first alone."""
    seen = []

    def jvp(fun, primals, moving, tangents, **params):
        seen.append(moving)
        return primitive.jvp_of_moving(fun, primals, moving, tangents, **params)

    product_p = primitive.define("product", lambda x, y: [x * y], lambda *_: None, jvp)
    gradient = jax.grad(lambda x: product_p.bind(x, X)[0].sum())(X)
    np.testing.assert_array_equal(gradient, X)
    assert seen == [[0]]


def test_shapes_follow_the_types_of_jax():
    """The same call gives float64 under 64-bit types, though its shapes were found before."""
    wide_p = primitive.define("wide", lambda: [jnp.zeros(3, float)], lambda *_: None)
    assert wide_p.bind()[0].dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide_p.bind()[0].dtype == jnp.float64
