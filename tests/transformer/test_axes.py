"""Logical axes: what lies where, and what the compiler is told."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from transformer.axes import RULES, constrain, partition
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
