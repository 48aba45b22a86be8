"""Attention whose keys and values are kept as int8 numbers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import write_read as kernel
from kernels.blocks import Blocks
from kernels.int8 import Int8, floats, quantise
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax


@dataclass(frozen=True)
class QuantisedSoftmax(Memory):
    """`Softmax` whose cells are rounded to int8, with a scale for each head of a key or a value.

    Cells, queries, `shared` and what is read are those of `Softmax`. A block is a pair of `Int8`,
    keys [K, S, H] and values [K, S, Hv]; a read makes floats of one tile of cells at a time. There
    is no gradient.

    Attributes:
      softmax: what a read is. Its backend must be "auto" or "xla", which runs it on any platform.
    """

    softmax: Softmax

    def __post_init__(self):
        if self.softmax.backend not in ("auto", "xla"):
            raise NotImplementedError(
                f"attention backend {self.softmax.backend!r} does not read cells in int8; choose "
                "xla or auto, or cache_dtype=None."
            )

    def empty(self, capacity, cell):
        """Returns keys and values of zeros."""
        zeros = self.softmax.empty(capacity, cell)
        one = lambda x: Int8(x.astype(jnp.int8), jnp.zeros((*x.shape[:-1], 1), jnp.float32))
        return tuple(map(one, zeros))

    def step(self, block, i, cell, query, shared):
        """Writes k and v at i, rounded, and reads by the formula of `Softmax`."""
        kept = tuple(map(quantise, cell))
        slot = i % block[0].numbers.shape[1]
        write = lambda x, new: x.at[:, slot].set(jnp.where(i >= 0, new, x[:, slot]))
        block = jax.tree.map(write, block, kept)
        return block, self.softmax.step(floats(block), i, floats(kept), query, shared)[1]

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence."""
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        block, z = self.rows(one(block), i[None], one(cells), queries[None], shared)
        return jax.tree.map(lambda x: x[0], block), z[0]

    def rows(self, block, i, cells, queries, shared):
        """T tokens of B sequences."""
        return self._chunk(block, i, cells, queries, shared, packed=False)

    def documents(self, capacity, block, i, cells, queries, shared):
        """T tokens of B rows of packed documents."""
        return self._chunk(block, i, cells, queries, shared, packed=True)

    def in_place(self, blocks: Blocks, i, cells, queries, shared):
        """One token of each sequence; one cell changes, and the read is where the cells lie."""
        kept = tuple(map(quantise, cells))
        return kernel.decode(blocks, i, kept, queries, **self._how(queries, shared))

    def read_in_place(self, blocks: Blocks, i, queries, shared):
        """One token of each sequence reads where the cells lie."""
        return kernel.read(blocks, i, queries, **self._how(queries, shared))

    def _chunk(self, block, i, cells, queries, shared, packed):
        leaves, tree = jax.tree.flatten(block)
        new = jax.tree.leaves(tuple(map(quantise, cells)))
        leaves, z = kernel.chunk(
            tuple(leaves),
            i,
            tuple(new),
            queries,
            packed=packed,
            keys_values=lambda arrays: jax.tree.unflatten(tree, arrays),
            **self._how(queries, shared),
        )
        return jax.tree.unflatten(tree, leaves), z

    def _how(self, queries, shared):
        return {
            "shared": self.softmax._shared(shared, queries),
            "options": self.softmax._options(queries),
            "backend": "xla",
        }
