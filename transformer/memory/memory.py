"""What a block is, and what writing and reading it mean.

A block belongs to one layer and one sequence: a cell for each position, or what its cells amount
to. It is touched by one instruction, the atomic `write_read`: write this token's cell, then read
the cells up to it. A `Memory` gives that instruction its meaning, for one token; the parallel form
follows from it, unless a faster one is given.

Two conventions hold in every memory:
- Position -1 is padding. It writes nothing, and what it reads is zeros.
- A token at position i sees cells 0..i, so a token at position 0 begins a sequence, whatever the
  block holds. Documents packed in one row are positions that begin again at 0.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from transformer.axes import gather_tokens


class Memory:
    """How a block is written and read. A subclass is a frozen, hashable dataclass.

    Cells, queries, what is read, and `shared` are pytrees of arrays. `shared` is what all tokens of
    all sequences have in common, such as a learned sink.

    `empty` and `step` must be given. `chunk`, `rows` and `documents` follow from `step`; a memory
    that overrides them keeps the law that they equal the scan of `step`.
    """

    def empty(self, capacity: int, cell):
        """Returns the block of a sequence that has no token yet.

        Args:
          capacity: how many positions the block must serve.
          cell: a pytree of what has a shape and a dtype, those of one cell.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what an empty block is.")

    def step(self, block, i, cell, query, shared):
        """Writes the cell of the token at position i and reads cells 0..i: the definition.

        Args:
          block: what the tokens before have written; for the token at position 0, which begins a
            sequence, it may hold anything.
          i: scalar int32, the position; it is never -1 unless `rows` is overridden.
          cell, query, shared: pytrees.

        Returns:
          (block, z), the block with the same shapes as before.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what one token does.")

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence: equal to the scan of `step`.

        Args:
          block: as in `step`.
          i: [T] int32, consecutive positions; padding is -1 and comes last.
          cells, queries: pytrees with a leading axis T.
          shared: as in `step`.

        Returns:
          (block, z), with a leading axis T on z.
        """
        return self._scan(block, i, cells, queries, shared)

    def rows(self, block, i, cells, queries, shared):
        """`chunk` for B sequences.

        Args:
          block, cells, queries: with a leading axis B.
          i: [B, T], or [1, T] where all sequences are at the same positions.
          shared: without an axis of sequences.
        """
        return over_rows(self.chunk, block, i, cells, queries, shared)

    def documents(self, capacity, block, i, cells, queries, shared):
        """`rows`, where positions may begin again at 0 within a row: several documents, packed.

        Afterwards the block of each sequence is that of its last document. `capacity` is that of
        the block.
        """
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), cells)
        fresh = self.empty(capacity, one)
        fresh = jax.tree.map(lambda x, like: x.astype(like.dtype), fresh, block)
        scan = lambda *operands: self._scan(*operands, fresh=fresh)
        return over_rows(scan, block, i, cells, queries, shared)

    def gather(self, cells, queries):
        """Brings together what lies on several devices, each of which has some of the T tokens.

        A token sees the cells of those before it, so every device gathers all cells. Its queries
        may stay as they are.

        Args:
          cells, queries: with leading axes [B, T].
        """
        return jax.tree.map(gather_tokens, cells), queries

    def depth(self, length: int) -> int:
        """How many steps wait for each other where `length` tokens run at once.

        Token after token, as in the scan of `step`, unless a memory says otherwise: one that
        overrides `chunk` should. `transformer.depth` counts them.
        """
        return length

    def in_place(self, blocks: Blocks, i, cells, queries, shared):
        """One token of each sequence (T = 1): writes and reads the blocks where they lie.

        Returns:
          (arrays, z), with the arrays in the form of `blocks.arrays`.
        """
        if blocks.batched:
            block, z = self.rows(blocks.take(), i, cells, queries, shared)
            return blocks.put(block), z
        # Without an axis of sequences: a state that a loop carries would be copied for its sake.
        one = lambda tree: jax.tree.map(lambda x: x[0], tree)
        block = blocks.take_as_it_lies()
        block, z = self.chunk(block, i[0], one(cells), one(queries), shared)
        return blocks.put_as_it_lies(block), jax.tree.map(lambda x: x[None], z)

    def read_in_place(self, blocks: Blocks, i, queries, shared):
        """One token of each sequence reads a block in which its cell is written.

        Returns:
          z with leading axes [B, 1], or None where the memory has no such way; the cell is then
          written again, into the block as it was before.
        """
        return None

    def _scan(self, block, i, cells, queries, shared, fresh=None):
        """The scan of `step`; where `fresh` is given, a token at position 0 begins from it."""

        def token(block, inputs):
            i, cell, query = inputs
            before = block
            if fresh is not None:
                before = where(i == 0, fresh, block)
            after, z = self.step(before, jnp.maximum(i, 0), cell, query, shared)
            after = jax.tree.map(lambda x, like: x.astype(like.dtype), after, block)
            return where(i >= 0, after, block), where(i >= 0, z, 0)

        if len(i) > 1:
            return jax.lax.scan(token, block, (i, cells, queries))
        block, z = token(block, jax.tree.map(lambda x: x[0], (i, cells, queries)))
        return block, jax.tree.map(lambda x: x[None], z)


def over_rows(chunk, block, i, cells, queries, shared):
    """`vmap` over sequences of `chunk`; positions [1, T] stay one array that all share."""
    mapped = None if i.shape[0] == 1 else 0
    i = i[0] if mapped is None else i
    return jax.vmap(chunk, in_axes=(0, mapped, 0, 0, None))(block, i, cells, queries, shared)


def where(condition, new, old):
    """`jnp.where` on pytrees; `old` may be one number for all leaves."""
    if isinstance(old, int):
        return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), new)
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def where_tokens(i, z):
    """z [T, ...] with zeros for padding."""
    return jax.vmap(partial(where, old=0))(i >= 0, z)
