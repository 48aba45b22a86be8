"""Several devices in one process: batches split by rows, the optimizer's state split (ZeRO-1).

Parameters are replicated, so the forward and backward pass move nothing but the gradient's sum.
What the optimizer remembers, and the moving average, are split: each device updates its part
(arXiv:1910.02054, stage 1). The rules say where arrays lie; the compiler adds the communication.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.data.batches import Batch
from transformer.training.step import TrainState

AXIS = "data"


def make_mesh(devices=None) -> Mesh:
    """A mesh of one axis, "data", over the devices; None: all of them."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of a state lies: a tree like the state, of `NamedSharding`s."""
    replicated = NamedSharding(mesh, PartitionSpec())
    replicate = lambda tree: jax.tree.map(lambda _: replicated, tree)
    split = lambda tree: jax.tree.map(
        lambda x: NamedSharding(mesh, _split(x.shape, mesh.size)), tree
    )
    return TrainState(
        step=replicated,
        params=replicate(state.params),
        optimizer_state=split(state.optimizer_state),
        ema=split(state.ema),
    )


def _split(shape, parts):
    """The first axis that divides into parts is split; an array without one is replicated.

    Of stacked layers that is the layer where it can be, and Muon then works on whole matrices.
    """
    axis = next((n for n, size in enumerate(shape) if size % parts == 0), None)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)


def shard_batch(mesh: Mesh, batch: Batch) -> Batch:
    """A batch [B, T] with its rows split over the mesh.

    Raises:
      ValueError: B is no multiple of the number of devices.
    """
    rows = len(batch.tokens)
    if rows % mesh.size:
        raise ValueError(
            f"a batch of {rows} rows cannot be split over {mesh.size} devices; use a batch size "
            f"that is a multiple of {mesh.size}."
        )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
