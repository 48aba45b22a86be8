"""The operands of a read besides queries, keys and values, as pytrees."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_positions", "kv_positions", "q_starts"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Where:
    """Which keys each query reads: those at positions start..i that its window reaches.

    Attributes:
      q_positions: [B or 1, T] int32, the position i of each query. A negative position marks
        padding, which reads nothing.
      kv_positions: [B or 1, S] int32, the position that each cell holds, negative if the cell is
        empty; if None, cell s holds position s.
      q_starts: [B or 1, T] int32, the first position that each query may read; if None, it is 0.
    """

    q_positions: jax.Array
    kv_positions: jax.Array | None = None
    q_starts: jax.Array | None = None

    def cells(self, num_cells: int, window: int | None):
        """The first and the last cell that each query sees, of cells that hold their own positions.

        Returns:
          first, last, empty: all [B or 1, T]. Where a query sees nothing it is empty, and cell 0
          stands for both ends.
        """
        first = jnp.zeros_like(self.q_positions)
        if self.q_starts is not None:
            first = jnp.maximum(self.q_starts, 0)
        if window is not None:
            first = jnp.maximum(first, self.q_positions - (window - 1))
        last = jnp.minimum(self.q_positions, num_cells - 1)
        empty = first > last
        return jnp.where(empty, 0, first), jnp.where(empty, 0, last), empty


@partial(jax.tree_util.register_dataclass, data_fields=["sinks", "alibi"], meta_fields=[])
@dataclass(frozen=True)
class Shared:
    """What all queries of a read have in common.

    Attributes:
      sinks: [N] logits that join the softmax's denominator, as in gpt-oss; None if there are none.
      alibi: [N] slopes (arXiv:2108.12409): slope * (i - p) is taken from each score. They are
        constants and have no gradient; None if there are none.
    """

    sinks: jax.Array | None = None
    alibi: jax.Array | None = None
