"""Logical axes: what lies where, and what the compiler is told."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from transformer.axes import MESH_AXES, RULES, constrain, gather_tokens, partition, split_over
from transformer.devices.mesh import make_mesh


def test_partition():
    assert partition("rows", None, "heads") == P(("data", "fsdp"), None, "tensor")


def test_without_a_mesh_nothing_is_said():
    assert "sharding_constraint" not in str(
        jax.make_jaxpr(lambda x: constrain(x, None))(jnp.ones(3))
    )


def test_mapped_axes_lie_as_their_name_says():
    rows = jax.vmap(lambda x: constrain(x, "heads"), spmd_axis_name=RULES["rows"])
    with jax.set_mesh(make_mesh("", jax.devices()[:1])):
        jaxpr = str(jax.make_jaxpr(rows)(jnp.ones((2, 3))))
    assert "(('data', 'fsdp'), 'tensor')" in jaxpr


def abstract(*sizes):
    """Within it, there is a mesh of these sizes."""
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, MESH_AXES, kinds))


def test_what_does_not_divide_is_not_split():
    assert split_over(8, "rows") == ()
    with abstract(1, 2, 2, 2):
        assert split_over(8, "rows") == ("fsdp",)
        assert split_over(8, "rows", "tokens", "heads") == ("fsdp", "context", "tensor")
        assert split_over(3, "tokens") == ()


def test_tokens_are_gathered_where_they_are_split():
    def text(*shape, **how):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return str(jax.make_jaxpr(lambda x: gather_tokens(x, **how))(x))

    with abstract(1, 1, 2, 2):
        assert "UNCONSTRAINED, None, UNCONSTRAINED" in text(3, 4, 5)
        assert "None, ('tensor', 'context')" in text(3, 4, 8, 5, heads=True)
        assert "sharding_constraint" not in text(3, 5, 8)  # there is no half of 5 tokens
