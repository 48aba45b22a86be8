"""`linear_call` under JAX's transformations, against the same map in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.tracing.linear import linear_call

# Residuals: weights that bend, a shift (an integer) and None. Two operands, one of which is shared.
SHIFT = jnp.int32(2)


def plain(residuals, operands):
    w, shift, _ = residuals
    bent = jnp.sin(w)
    return {
        "mixed": bent @ operands["x"] + jnp.roll(operands["y"], shift),
        "total": (w**2 * operands["y"]).sum(),
    }


def transpose(residuals, cotangents):
    w, shift, _ = residuals
    mixed, total = cotangents["mixed"], cotangents["total"]
    return {"x": jnp.sin(w).T @ mixed, "y": jnp.roll(mixed, -shift) + (w**2).sum(0) * total}


def ours(residuals, operands):
    return linear_call(plain, transpose, residuals, operands)


def loss(call):
    """A scalar that is nonlinear in the weights and in the results."""

    def of(w, x, y):
        results = call((w, SHIFT, None), {"x": x, "y": y})
        return (jnp.sin(results["mixed"]) * results["mixed"]).sum() * jnp.cos(results["total"])

    return of


def arrays(*leading):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32)
    return normal(5, 5) / 4, normal(5) / 4, normal(5) / 4


def tangents(primals):
    return tuple(jnp.cos(3 * x) for x in primals)


EACH = (0, 1, 2)


def jvp(f):
    return lambda *x: jax.jvp(f, x, tangents(x))


def gradient_of_operands(f):
    return jax.grad(f, (1, 2))


def product_with_the_hessian(f):
    return jvp(jax.grad(f, EACH))


def linearized(f):
    def of(*x):
        value, tangent_map = jax.linearize(f, *x)
        return value, tangent_map(*tangents(x))

    return of


def through_a_scan(f):
    """Two steps, each recomputed in the backward pass."""

    def steps(w, x, y):
        step = jax.checkpoint(lambda total, n: (total + f(n * w, x, y) * total, None))
        return jax.lax.scan(step, 1.0, jnp.array([0.5, 1.5]))[0]

    return jax.grad(steps, EACH)


TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(f, EACH),
    "grad of operands": gradient_of_operands,
    "jvp": jvp,
    "linearize": linearized,
    "jvp of grad": product_with_the_hessian,
    "grad of jvp": lambda f: jax.grad(lambda *x: jvp(f)(*x)[1], EACH),
    "scan and remat": through_a_scan,
}


def assert_same(got, want):
    # Both are float32 sums of some dozen products of about 1, in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformation_equals_that_of_plain_jax(name):
    got, want = (jax.jit(TRANSFORMS[name](loss(call)))(*arrays()) for call in (ours, plain))
    assert_same(got, want)


@pytest.mark.parametrize("in_axes", [(None, 0, None), (1, None, 0)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_vmap_in_either_order(name, in_axes):
    """Also where residuals or operands are not mapped: all of the axis adds to their gradient."""
    primals = tuple(
        x if dim is None else jnp.moveaxis(many, 0, dim)
        for x, many, dim in zip(arrays(), arrays(3), in_axes, strict=True)
    )

    def both(call):
        outside = jax.vmap(TRANSFORMS[name](loss(call)), in_axes)
        inside = TRANSFORMS[name](lambda *x: jax.vmap(loss(call), in_axes)(*x).sum())
        return jax.jit(lambda *x: (outside(*x), inside(*x)))(*primals)

    assert_same(*map(both, (ours, plain)))


def test_nested_vmap():
    w, x, y = arrays(2, 3)
    of = lambda call: jax.vmap(jax.vmap(jax.grad(loss(call), EACH), (None, 0, None)))
    assert_same(*(of(call)(w[:, 0], x, y[:, 0]) for call in (ours, plain)))


def test_the_name_of_a_mapped_axis_is_seen_inside():
    def plain(_, x):
        return x - jax.lax.pmean(x, "rows")

    def ours(x):
        return linear_call(plain, plain, None, x)  # it is its own transpose

    loss = lambda f: lambda x: jnp.sin(jax.vmap(f, axis_name="rows")(x)).sum()
    x = arrays(3)[1]
    for transform in (jax.grad, jvp, product_with_the_hessian_of_one):
        assert_same(*(transform(loss(f))(x) for f in (ours, lambda x: plain(None, x))))


def product_with_the_hessian_of_one(f):
    return jvp(jax.grad(f))


def test_reverse_mode_runs_our_transpose():
    """A transpose that is wrong on purpose shows in the gradient, and only there."""
    double = lambda residuals, cotangents: jax.tree.map(
        lambda x: 2 * x, transpose(residuals, cotangents)
    )
    wrong = lambda *args: linear_call(plain, double, *args)
    x = arrays()
    gradient = gradient_of_operands
    assert_same(jvp(loss(wrong))(*x), jvp(loss(plain))(*x))
    twice = jax.tree.map(lambda x: 2 * x, gradient(loss(plain))(*x))
    assert_same(gradient(loss(wrong))(*x), twice)


def test_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x, y = arrays(2)

    def of(call):
        # Weights and y are the same on every device: their gradients are sums over the devices.
        rows = jax.vmap(loss(call), (None, 0, None))
        split = jax.shard_map(rows, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data"))
        return jax.jit(product_with_the_hessian(lambda *x: split(*x).sum()))

    assert_same(*(of(call)(w[0], x, y[0]) for call in (ours, plain)))


def test_an_equal_map_is_traced_once():
    count = []

    def counted(residuals, operands):
        count.append(1)
        return plain(residuals, operands)

    call = lambda *args: linear_call(counted, transpose, *args)
    w, x, y = arrays()
    f = loss(call)
    jax.make_jaxpr(lambda w, x, y: f(w, x, y) + f(w, y, x))(w, x, y)
    assert len(count) == 1


def test_wrong_use_is_refused():
    w, x, y = arrays()
    with pytest.raises(TypeError, match="an operand of dtype int32"):
        ours((w, SHIFT, None), {"x": x, "y": jnp.arange(5)})
    short = lambda residuals, cotangents: transpose(residuals, cotangents)["x"]
    wrong = lambda *args: linear_call(plain, short, *args)
    with pytest.raises(TypeError, match="must return a cotangent for each operand"):
        gradient_of_operands(loss(wrong))(w, x, y)
