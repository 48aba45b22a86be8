"""Blocks as they lie in a cache: one block or a stack of them, for one sequence or for several.

A block is a pytree of arrays. They may stand alone, or have an axis of L layers in front, whose
blocks then share one array; and in front of that, they may have an axis of B sequences. A function
that reads or writes a block in place must know which it is. `Blocks` says so, and nothing is
guessed from the number of axes.
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
    """The blocks that one instruction may read and write.

    Attributes:
      arrays: a pytree of arrays [..., block]; in front of the block's own axes stand [B] where
        `batched`, and then [L] where there is a `layer`.
      layer: a scalar int32, the one of the L layers that is meant; None if no layers are stacked.
      batched: whether there is an axis of sequences; if there is not, B is 1.
    """

    arrays: Any
    layer: jax.Array | None = None
    batched: bool = False

    def take(self):
        """Returns the block of the layer, with an axis of sequences: arrays [B, block]."""
        block = self.take_as_it_lies()
        return block if self.batched else jax.tree.map(lambda x: x[None], block)

    def take_as_it_lies(self):
        """Returns the block of the layer: arrays [B, block] if `batched`, else [block]."""
        if self.layer is None:
            return self.arrays
        one = partial(
            jax.lax.dynamic_index_in_dim, index=self.layer, axis=int(self.batched), keepdims=False
        )
        return jax.tree.map(one, self.arrays)

    def put(self, block):
        """Returns all arrays, with `block` [B, block] in place of the layer's own."""
        return self.put_as_it_lies(block if self.batched else jax.tree.map(lambda x: x[0], block))

    def put_as_it_lies(self, block):
        """Does what `put` does, for a block as `take_as_it_lies` returns it."""
        if self.layer is None:
            return block
        one = partial(jax.lax.dynamic_update_index_in_dim, index=self.layer, axis=int(self.batched))
        return jax.tree.map(one, self.arrays, block)

    def tile(self, begin, size):
        """Cells of blocks [K, S, ...] from `begin` on, so many: arrays [B, K, size, ...]."""
        at = self.index(0, 0, begin, 0)

        def one(x):
            K, _, H = x.shape[-3:]
            front = (*x.shape[: int(self.batched)], *(() if self.layer is None else (1,)))
            return jax.lax.dynamic_slice(x, at, (*front, K, size, H)).reshape(-1, K, size, H)

        return jax.tree.map(one, self.arrays)

    def index(self, row, *within):
        """Returns where a slice begins: the sequence, the layer, then the block's own axes."""
        front = [*([row] if self.batched else []), *([] if self.layer is None else [self.layer])]
        return [jnp.asarray(n, jnp.int32) for n in (*front, *within)]
