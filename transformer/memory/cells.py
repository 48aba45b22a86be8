"""Memories that keep cells one by one, and read them by a function written for one query."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

import kernels.cells
from transformer.memory.memory import Memory, where


@dataclass(frozen=True)
class Cells(Memory):
    """One cell for each position, any pytree, read by any function of the cells up to one's own.

    A block has the shapes of a cell with an axis of S cells, the capacity, in front. A read looks
    at all S cells, so it costs in proportion to the capacity.

    Attributes:
      read: `read(query, cells, visible, shared) -> z`, for one query. `cells` has a leading axis S,
        cell s being that of position s; `visible` [S] is True for those up to the token's own. The
        others hold numbers without a meaning, which must not change z: set their weights to zero.
    """

    read: Callable

    def empty(self, capacity, cell):
        """Returns `capacity` cells of zeros."""
        return jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), cell)

    def step(self, block, i, cell, query, shared):
        """Writes cell i, and reads."""
        at = jnp.maximum(i, 0)

        def write(x, new):
            new = jnp.where(i >= 0, new.astype(x.dtype), x[at])
            return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)

        block = jax.tree.map(write, block, cell)
        return block, self._read(i, query, block, shared)

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence."""
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        block, z = self.rows(one(block), i[None], one(cells), one(queries), shared)
        return jax.tree.map(lambda x: x[0], (block, z))

    def rows(self, block, i, cells, queries, shared):
        """Writes all cells, then reads for every query."""
        block = _write(block, i, cells)
        read = lambda *operands: self._read(*operands, shared)
        over_tokens = jax.vmap(read, in_axes=(0, 0, None))
        over_rows = jax.vmap(over_tokens, in_axes=(None if i.shape[0] == 1 else 0, 0, 0))
        return block, over_rows(i[0] if i.shape[0] == 1 else i, queries, block)

    def documents(self, capacity, block, i, cells, queries, shared):
        """Rows of packed documents: each token reads its own document, moved to cell 0."""
        places = i[:, :1] + jnp.arange(i.shape[1], dtype=jnp.int32)
        places = jnp.where(i >= 0, places, -1)
        written = _write(block, places, cells)

        def row(row, i, places, queries):
            twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), row)

            def document(start):
                cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, len(x) // 2, 0)
                return jax.tree.map(cut, twice)

            starts = jnp.where(i >= 0, places - i, 0)
            read = lambda token: self._read(token[0], token[1], document(token[2]), shared)
            z = jax.lax.map(read, (i, queries, starts))
            return document(starts[jnp.maximum((i >= 0).sum() - 1, 0)]), z

        i, places = (jnp.broadcast_to(x, (len(_leaf(block)), i.shape[1])) for x in (i, places))
        return jax.vmap(row)(written, i, places, queries)

    def _read(self, i, query, block, shared):
        # Padding looks at cell 0, and what it reads is dropped: a read of nothing may make a nan.
        visible = jnp.arange(len(_leaf(block)), dtype=jnp.int32) <= jnp.maximum(i, 0)
        return where(i >= 0, self.read(query, block, visible, shared), 0)


@dataclass(frozen=True)
class Window(Memory):
    """The last `size` cells, the token's own included: short convolutions, token shift.

    A block has the shapes of a cell with an axis of size - 1 cells in front, in the order of their
    positions. For windows of more than a few dozen cells, `Softmax(window=...)` is the better way.

    Attributes:
      size: how many positions a token sees, its own included; at least 1.
      read: `read(query, cells, visible, shared) -> z`, for one query. `cells` has a leading axis
        `size`, oldest first and the token's own last; `visible` [size] is False for those before
        position 0, whose numbers must not change z.
    """

    size: int
    read: Callable

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}; a window holds at least 1 cell, the token's own.")

    def empty(self, capacity, cell):
        """Returns size - 1 cells of zeros."""
        return jax.tree.map(lambda x: jnp.zeros((self.size - 1, *x.shape), x.dtype), cell)

    def step(self, block, i, cell, query, shared):
        """Appends the cell, reads, and drops the oldest."""
        append = lambda x, new: jnp.concatenate([x, new[None].astype(x.dtype)])
        cells = jax.tree.map(append, block, cell)
        z = self.read(query, cells, self._visible(i), shared)
        block = where(i >= 0, jax.tree.map(lambda x: x[1:], cells), block)
        return block, where(i >= 0, z, 0)

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, shared):
        """Reads for all tokens from the block and the chunk behind it, shifted `size` times."""
        if len(i) == 1:
            return self._scan(block, i, cells, queries, shared)
        append = lambda x, new: jnp.concatenate([x, new.astype(x.dtype)])
        cells = jax.tree.map(append, block, cells)
        shifted = lambda x: jnp.stack([x[n : n + len(i)] for n in range(self.size)], axis=1)
        windows = jax.tree.map(shifted, cells)
        visible = jax.vmap(self._visible)(i)
        z = jax.vmap(self.read, in_axes=(0, 0, 0, None))(queries, windows, visible, shared)
        count = jnp.sum(i >= 0, dtype=jnp.int32)
        last = lambda x: jax.lax.dynamic_slice_in_dim(x, count, self.size - 1, 0)
        return jax.tree.map(last, cells), where_tokens(i, z)

    def documents(self, capacity, block, i, cells, queries, shared):
        """As `rows`: what lies before a document's position 0 is never visible."""
        return self.rows(block, i, cells, queries, shared)

    def _visible(self, i):
        places = jnp.arange(self.size - 1, -1, -1, dtype=jnp.int32)
        return jnp.maximum(i, 0) - places >= 0  # padding sees its own cell, as in Cells


def where_tokens(i, z):
    """z [T, ...] with zeros for padding."""
    return jax.vmap(partial(where, old=0))(i >= 0, z)


def _leaf(block):
    return jax.tree.leaves(block)[0]


def _write(block, i, cells):
    """Writes cells [B, T, ...] into blocks [B, S, ...] at consecutive places i [B or 1, T]."""

    def write(x, new):
        flat = lambda x: x.reshape(*x.shape[:2], -1)[:, None]  # [B, 1, S or T, numbers of a cell]
        return kernels.cells.write(flat(x), i, flat(new.astype(x.dtype))).reshape(x.shape)

    return jax.tree.map(write, block, cells)
