"""The mesh of devices that a run is laid out on."""

import math

import jax
from jax.sharding import AxisType, Mesh

from transformer.axes import MESH_AXES


def make_mesh(sizes: str, devices=None) -> Mesh:
    """Makes a mesh from a text such as "data=2,fsdp=2,tensor=2".

    Args:
      sizes: the size of each axis of `transformer.axes.MESH_AXES`; one that is not named is 1, and
        one of them may be -1, which is as many as there are devices for.
      devices: what the mesh is made of; None: all devices of all processes. Where they are more
        than the mesh has room for, the first ones are taken.

    Raises:
      ValueError: an axis does not exist, a size is out of its range, or there are not that many
        devices, or, with several processes, more.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(sizes, len(devices))
    size = math.prod(shape.values())
    if jax.process_count() > 1 and size != len(devices):
        raise ValueError(
            f"mesh={sizes!r} takes {size} devices, and the {jax.process_count()} processes have "
            f"{len(devices)}; each of them must be used, so write -1 for one of the sizes."
        )
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(shape.values()), MESH_AXES, kinds, devices=devices[:size])


def mesh_shape(sizes: str, num_devices: int) -> dict[str, int]:
    """The size of every axis of `make_mesh`'s mesh, as far as it is made of so many devices.

    Raises:
      ValueError: as in `make_mesh`.
    """
    shape, given = dict.fromkeys(MESH_AXES, 1), set()
    for part in filter(None, sizes.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in shape:
            raise ValueError(
                f"mesh={sizes!r} has an axis {name!r}; the axes are {', '.join(MESH_AXES)}."
            )
        if not size.removeprefix("-").isdigit() or int(size) < -1 or int(size) == 0:
            raise ValueError(
                f"mesh={sizes!r} has {part!r}; a size is at least 1, or -1 for as many as there "
                "are devices for."
            )
        if name in given:
            raise ValueError(f"mesh={sizes!r} gives the size of {name!r} twice.")
        given.add(name)
        shape[name] = int(size)
    rest = [name for name, size in shape.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh={sizes!r} has several sizes of -1; one axis can have it.")
    known = math.prod(size for size in shape.values() if size != -1)
    if known > num_devices or (rest and num_devices % known):
        wanted = f"a multiple of {known}" if rest else str(known)
        raise ValueError(
            f"mesh={sizes!r} takes {wanted} devices, and there are {num_devices}. "
            "(XLA_FLAGS=--xla_force_host_platform_device_count=N makes a CPU into N devices.)"
        )
    for name in rest:
        shape[name] = num_devices // known
    return shape
