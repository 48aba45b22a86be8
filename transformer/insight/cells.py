"""The cells that the tokens of a chunk may see, one by one: those of the block, and the chunk's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.memory.latent import Latent
from transformer.memory.memory import Memory


class Seen(NamedTuple):
    """Cells in a row, S of the block as it was and T of the chunk, and who may see them.

    Attributes:
      cells: a pytree with a leading axis S + T.
      positions: [S + T] int32, the position of each; negative where a cell is empty.
      visible: [T, S + T] bool, which of them each token sees.
    """

    cells: Any
    positions: jax.Array
    visible: jax.Array


def seen(memory: Memory, block, i, cells, packed: bool = False) -> Seen:
    """Finds which cells the tokens of a chunk see.

    Args:
      memory: `Softmax` or `Latent`.
      block: as it was before the chunk.
      i: [T] int32, as in `Memory.chunk`.
      cells: a pytree with a leading axis T.
      packed: whether positions may begin again at 0.
    """
    old = _in_front(memory, block)
    size = len(jax.tree.leaves(old)[0])
    last = i[0] - 1
    held = last - (last - jnp.arange(size, dtype=jnp.int32)) % size
    positions = jnp.concatenate([held, i])
    distance = i[:, None] - positions
    visible = (positions >= 0) & (distance >= 0)
    if getattr(memory, "window", None) is not None:
        visible &= distance < memory.window
    if packed:
        document = jnp.cumsum(i == 0)
        visible &= document[:, None] == jnp.concatenate([jnp.zeros(size, document.dtype), document])
    together = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)])
    return Seen(jax.tree.map(together, old, cells), positions, visible)


def _in_front(memory, block):
    """The cells of a block with the axis of cells in front."""
    if isinstance(memory, Latent):
        return block[0]
    return jax.tree.map(lambda x: x.swapaxes(0, 1), block)
