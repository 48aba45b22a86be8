"""Blocks as they lie in a cache: one block or a stack of them, for one sequence or for several.

The arrays of a block, a pytree, may stand alone; or with an axis of L layers in front, whose
blocks share one array; and in front of that with an axis of B sequences. What reads or writes a
block in place must know which, and this says so: nothing is guessed from the number of axes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


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
        block = self.take_as_it_lies()
        return block if self.batched else jax.tree.map(lambda x: x[None], block)

    def take_as_it_lies(self):
        """The block of the one layer: arrays [B, block] where `batched`, else [block]."""
        if self.layer is None:
            return self.arrays
        one = partial(
            jax.lax.dynamic_index_in_dim, index=self.layer, axis=int(self.batched), keepdims=False
        )
        return jax.tree.map(one, self.arrays)

    def put(self, block):
        """The arrays with the one layer's block, [B, block], in place of what it was."""
        return self.put_as_it_lies(block if self.batched else jax.tree.map(lambda x: x[0], block))

    def put_as_it_lies(self, block):
        """`put` of a block as `take_as_it_lies` gives it."""
        if self.layer is None:
            return block
        one = partial(jax.lax.dynamic_update_index_in_dim, index=self.layer, axis=int(self.batched))
        return jax.tree.map(one, self.arrays, block)

    def index(self, row, *within):
        """Where a slice of the arrays begins: sequence `row`, layer, then the block's own axes."""
        front = [*([row] if self.batched else []), *([] if self.layer is None else [self.layer])]
        return [jnp.asarray(n, jnp.int32) for n in (*front, *within)]
