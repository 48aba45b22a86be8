"""Blocks as they lie in a cache: one block or a stack of them, for one sequence or for several.

The arrays of a block, a pytree, may stand alone; or with an axis of L layers in front, whose
blocks share one array; and in front of that with an axis of B sequences. What reads or writes a
block in place must know which, and this says so: nothing is guessed from the number of axes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "layer"],
    meta_fields=["batched"],
)
@dataclass(frozen=True)
class Blocks:
    """The blocks that one instruction may touch.

    Attributes:
      arrays: a pytree of arrays [..., block]; in front of the block's own axes stand [B] where
        `batched`, and then [L] where there is a `layer`.
      layer: scalar int32, which of the L layers is meant; None where no layers are stacked.
      batched: whether there is an axis of sequences; without it B is 1.
    """

    arrays: Any
    layer: jax.Array | None = None
    batched: bool = False

    def take(self):
        """The block of the one layer, with an axis of sequences: arrays [B, block]."""

        def one(x):
            if self.layer is not None:
                x = jax.lax.dynamic_index_in_dim(x, self.layer, int(self.batched), keepdims=False)
            return x if self.batched else x[None]

        return jax.tree.map(one, self.arrays)

    def put(self, block):
        """The arrays with the one layer's block, [B, block], in place of what it was."""

        def one(x, new):
            new = new if self.batched else new[0]
            if self.layer is None:
                return new
            return jax.lax.dynamic_update_index_in_dim(x, new, self.layer, int(self.batched))

        return jax.tree.map(one, self.arrays, block)

    def index(self, row, *within):
        """Where a slice of the arrays begins: sequence `row`, layer, then the block's own axes."""
        return [
            *([row] if self.batched else []),
            *([] if self.layer is None else [self.layer]),
            *within,
        ]
