"""Meshes from a text."""

import jax
import pytest

from transformer.devices.mesh import make_mesh, mesh_shape


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (1, 1, 1, 1)),
        ("data=-1", (8, 1, 1, 1)),
        ("fsdp=2, tensor=-1", (1, 2, 1, 4)),
        ("data=2,fsdp=2,tensor=2,context=1", (2, 2, 1, 2)),
        ("tensor=3", (1, 1, 1, 3)),
    ],
)
def test_sizes(text, sizes):
    assert tuple(mesh_shape(text, 8).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "has an axis 'model'; the axes are data, fsdp, context, tensor"),
        ("data=two", "has 'data=two'; a size is at least 1, or -1"),
        ("data", "has 'data'; a size"),
        ("data=0", "has 'data=0'; a size"),
        ("data=2,fsdp=2,data=4", "gives the size of 'data' twice"),
        ("data=-1,fsdp=-1", "several sizes of -1"),
        ("data=16", "takes 16 devices, and there are 8"),
        ("data=-1,fsdp=3", "takes a multiple of 3 devices, and there are 8"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(text, 8)


def test_a_mesh_of_one_device():
    mesh = make_mesh("data=-1", jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.size == 1
