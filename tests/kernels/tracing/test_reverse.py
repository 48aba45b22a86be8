"""Functions that have a first derivative in reverse mode and refuse every other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.tracing.reverse import NoSuchDerivative, reverse_only

MESSAGE = "only jax.grad, once"


def plain(moving, fixed):
    a, b = moving
    return jnp.sin(a) * b * fixed, (a * b).sum()


ours = reverse_only(plain, MESSAGE)


def loss(function):
    def of(a, b, fixed):
        product, total = function((a, b), fixed)
        return (product**2).sum() + total

    return of


def both(x):
    return jnp.stack([x, -x])


@pytest.fixture
def operands(rng):
    a, b = (jnp.asarray(rng.normal(size=3), jnp.float32) for _ in range(2))
    return a, b, jnp.arange(3)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: jax.grad(f, (0, 1)),
        lambda f: jax.jit(jax.grad(f, 1)),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: lambda a, b, fixed: jax.vmap(jax.grad(f), (None, 0, None))(a, both(b), fixed),
        lambda f: jax.grad(
            lambda a, b, fixed: jax.vmap(f, (None, 0, None))(a, both(b), fixed).sum()
        ),
    ],
    ids=["values", "grad", "grad of one operand", "remat", "vmap of grad", "grad of vmap"],
)
def test_values_and_gradients_are_those_of_plain_jax(operands, transform):
    a, b, fixed = operands
    got, want = (transform(loss(f))(a, b, fixed) for f in (ours, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.jvp(jax.grad(f), (x,), (x,)),
        lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x),
    ],
    ids=["jvp", "linearize", "forward over reverse", "reverse over reverse"],
)
def test_other_derivatives_are_refused(operands, derivative, jit):
    a, b, fixed = operands
    run = lambda a: derivative(lambda a: loss(ours)(a, b, fixed), a)
    with pytest.raises(NoSuchDerivative, match=MESSAGE):
        (jax.jit(run) if jit else run)(a)


def test_inside_shard_map_the_gradient_of_what_devices_share_is_summed_once(operands):
    """Counted in the text of the program, so that four devices need not be there."""
    a, b, fixed = operands
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    total = jax.shard_map(
        lambda a, b: jax.lax.psum(loss(ours)(a, b, fixed), "data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    text = str(jax.make_jaxpr(jax.grad(total))(a, jnp.tile(b, 4)))
    assert text.count("= psum") == 2  # of the loss, and of the gradient of a
