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
    "embedding_in": (None, "width"),
    "embedding_out": ("width", None),
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


def shard_params(mesh: Mesh, params: Params) -> Params:
    """Lays parameters, which every process has, on the mesh."""
    return jax.tree.map(_shard, params, param_shardings(mesh, params))


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
    """Lays a batch [B, T], which every process has, on the mesh.

    Raises:
      ValueError: B or T cannot be split as the mesh asks.
    """
    check_batch(mesh, *np.shape(batch.tokens))
    at = batch_sharding(mesh)
    return jax.tree.map(lambda x: _shard(x, at), batch)


def process_rows(mesh: Mesh, B: int) -> tuple[int, int]:
    """Which rows of a batch lie on this process's devices: part `index` of `count` equal parts.

    Processes that hold other positions, or other parts of matrices, have the same rows.

    Raises:
      ValueError: the rows of this process's devices do not follow each other.
    """
    check_batch(mesh, B, mesh.shape["context"])
    indices = batch_sharding(mesh).addressable_devices_indices_map((B, mesh.shape["context"]))
    parts = {rows.indices(B)[:2] for rows, _ in indices.values()}
    begin, size = min(parts)[0], sum(stop - start for start, stop in parts)
    if begin % size or max(parts)[1] != begin + size or B % size:
        raise ValueError(
            f"on the mesh {dict(mesh.shape)} this process's devices hold rows that do not follow "
            "each other; make data x fsdp a multiple of the number of processes."
        )
    return begin // size, B // size


def shard_rows(mesh: Mesh, B: int, rows: Batch) -> Batch:
    """Lays a batch of B rows on the mesh; each process has its part of them, `process_rows`."""
    at, T = batch_sharding(mesh), rows.tokens.shape[1]
    # The shape is given, as a process of a part of the tokens has whole rows too.
    whole = lambda x: jax.make_array_from_process_local_data(at, x, (B, T))
    return jax.tree.map(whole, rows)


def check_batch(mesh: Mesh, B: int, T: int) -> None:
    """Refuses a batch [B, T] that does not divide over the mesh.

    Raises:
      ValueError: B or T cannot be split as the mesh asks.
    """
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


def _shard(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


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
