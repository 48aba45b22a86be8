"""Where the arrays of a run lie on a mesh.

`PARAMETERS` gives the logical axes of every matrix, and `transformer.axes.RULES` which axes of the
mesh those are split over. The compiler adds the communication.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.axes import partition
from transformer.data.batches import Batch
from transformer.program.experts import Experts
from transformer.program.params import Params
from transformer.training.step import TrainState

# The last two axes of a parameter, by the names that lead to it; those before are repeats of a
# layer, which stay whole. What is not named here, norms and biases above all, is small and whole.
PARAMETERS = {
    "embedding": ("vocabulary", "width"),
    "positions": (None, "width"),
    "output": ("width", "vocabulary"),
    "mixer.query": ("width", "heads"),
    "mixer.key": ("width", "heads"),
    "mixer.value": ("width", "heads"),
    "mixer.gate": ("width", "heads"),
    "mixer.output": ("heads", "width"),
    # What all heads share, and the channels of the delta rule, in which keys and values follow
    # each other, so that no part of them holds whole heads.
    "mixer.query_down": ("width", None),
    "mixer.down": ("width", None),
    "mixer.channels": ("width", None),
    "feed_forward.up": ("width", "feed_forward"),
    "feed_forward.gate": ("width", "feed_forward"),
    "feed_forward.down": ("feed_forward", "width"),
}


def param_shardings(mesh: Mesh, params: Params) -> Params:
    """Where each array of the parameters, or of a tree like them, lies."""

    def of_array(path, x, experts=False):
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        name = ".".join([name for name in names if name not in ("layers", "weight")][-2:])
        axes = PARAMETERS.get(name, ())
        if experts and axes:  # [experts, in, out]
            axes = ("experts", *("width" if axis == "width" else None for axis in axes))
        if len(axes) > x.ndim:
            axes = ()
        axes = (*[None] * (x.ndim - len(axes)), *axes)
        return NamedSharding(mesh, _divisible(mesh, partition(*axes), x.shape))

    def of_node(path, node):
        if not isinstance(node, Experts):
            return of_array(path, node)
        of = lambda inner, x: of_array((*path, *inner), x, experts=True)
        return jax.tree_util.tree_map_with_path(of, node)

    is_experts = lambda node: isinstance(node, Experts)
    return jax.tree_util.tree_map_with_path(of_node, params, is_leaf=is_experts)


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of a state lies: a tree like the state, of `NamedSharding`s.

    What the optimizer remembers, and the moving average, lie as the parameters do, and are split
    over "data" too: each device updates its part (ZeRO-1, arXiv:1910.02054).
    """
    whole = NamedSharding(mesh, PartitionSpec())
    is_params = lambda node: isinstance(node, Params)

    def of_params(params):
        shardings = param_shardings(mesh, params)
        return jax.tree.map(lambda x, at: _split_over_data(at, x.shape), params, shardings)

    of_node = lambda node: of_params(node) if is_params(node) else whole
    return TrainState(
        step=whole,
        params=param_shardings(mesh, state.params),
        optimizer_state=jax.tree.map(of_node, state.optimizer_state, is_leaf=is_params),
        ema=None if state.ema is None else of_params(state.ema),
        base=None if state.base is None else param_shardings(mesh, state.base),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where arrays [B, T] of a batch lie."""
    return NamedSharding(mesh, partition("rows", "tokens"))


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Lays a batch [B, T] on the mesh.

    Raises:
      ValueError: B or T cannot be split as the mesh asks.
    """
    B, T = np.shape(batch.tokens)
    rows, context = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    if B % rows:
        raise ValueError(
            f"a batch of {B} rows cannot be split over data x fsdp = {rows} devices; use a batch "
            f"size that is a multiple of {rows}, or a mesh with a smaller product of the two."
        )
    if T % context:
        raise ValueError(
            f"rows of {T} tokens cannot be split over context={context} devices; use a length that "
            f"is a multiple of {context}, or a smaller context."
        )
    return jax.device_put(batch, batch_sharding(mesh))


def _divisible(mesh, spec, shape):
    """The spec, without the mesh axes that an axis of the array does not divide over."""
    fits = lambda size, names: size % _parts(mesh, names) == 0
    return PartitionSpec(*(n if fits(s, n) else None for n, s in zip(spec, shape, strict=True)))


def _split_over_data(sharding, shape):
    """Splits the first axis that divides; an array without one stays as it is.

    Of stacked layers that is the layer where it can be, and Muon then works on whole matrices.
    """
    mesh, spec = sharding.mesh, list(sharding.spec)
    for n, size in enumerate(shape):
        names = (*_names(spec[n]), "data")
        if size % _parts(mesh, names) == 0:
            return NamedSharding(mesh, PartitionSpec(*spec[:n], names, *spec[n + 1 :]))
    return sharding


def _names(axis):
    return (axis,) if isinstance(axis, str) else axis or ()


def _parts(mesh, axis):
    return math.prod(mesh.shape[name] for name in _names(axis))
