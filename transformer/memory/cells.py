"""Memories that keep cells one by one, and read them by a function written for one query."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

import kernels.cells
from kernels.blocks import Blocks
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

    def in_place(self, blocks: Blocks, i, cells, queries, shared):
        """One token of each sequence: one cell changes, and the read is where the cells lie."""
        arrays = kernels.cells.write_one(blocks, i[:, 0], cells, axis=0)
        written = replace(blocks, arrays=arrays)
        return arrays, self.read_in_place(written, i, queries, shared)

    def read_in_place(self, blocks: Blocks, i, queries, shared):
        """One token of each sequence reads where the cells lie."""
        return one_token(lambda *token: self._read(*token, shared), blocks, i, queries)

    def _read(self, i, query, block, shared):
        # Padding looks at cell 0, and what it reads is dropped: a read of nothing may make a nan.
        visible = jnp.arange(len(_leaf(block)), dtype=jnp.int32) <= jnp.maximum(i, 0)
        return where(i >= 0, self.read(query, block, visible, shared), 0)


@dataclass(frozen=True)
class Window(Memory):
    """The last `size` cells, the token's own included: short convolutions, token shift.

    A block has the shapes of a cell with an axis of `size` cells in front: a ring, in which
    position p lies in cell p % size. For windows of more than a few dozen cells,
    `Softmax(window=...)` is the better way.

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
        """Returns `size` cells of zeros."""
        return jax.tree.map(lambda x: jnp.zeros((self.size, *x.shape), x.dtype), cell)

    def step(self, block, i, cell, query, shared):
        """Writes cell i, and reads the window in the order of positions."""
        at = jnp.maximum(i, 0) % self.size

        def write(x, new):
            new = jnp.where(i >= 0, new.astype(x.dtype), x[at])
            return jax.lax.dynamic_update_index_in_dim(x, new, at, 0)

        block = jax.tree.map(write, block, cell)
        return block, self._read(i, query, self._in_order(block, i + 1), shared)

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence."""
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        block, z = self.rows(one(block), i[None], one(cells), one(queries), shared)
        return jax.tree.map(lambda x: x[0], (block, z))

    def gather(self, cells, queries):
        """Nothing: a token sees no others than its neighbours."""
        return cells, queries

    def rows(self, block, i, cells, queries, shared):
        """Reads from the ring in order and the chunk behind it, shifted `size` times."""
        cells = jax.tree.map(lambda x, like: x.astype(like.dtype), cells, block)

        def row(i, queries, block, cells):
            def windows(before, new):
                return jnp.stack([_later(before, new, n) for n in range(self.size)[::-1]], axis=1)

            seen = jax.tree.map(windows, self._in_order(block, i[0]), cells)
            return jax.vmap(lambda *token: self._read(*token, shared))(i, queries, seen)

        shared_i = i.shape[0] == 1
        over_rows = jax.vmap(row, in_axes=(None if shared_i else 0, 0, 0, 0))
        z = over_rows(i[0] if shared_i else i, queries, block, cells)
        write = lambda x, new: kernels.cells.write_last(flat(x), i, flat(new), ring=True)
        return jax.tree.map(lambda x, new: write(x, new).reshape(x.shape), block, cells), z

    def documents(self, capacity, block, i, cells, queries, shared):
        """As `rows`: what lies before a document's position 0 is never visible."""
        return self.rows(block, i, cells, queries, shared)

    def in_place(self, blocks: Blocks, i, cells, queries, shared):
        """One token of each sequence: one cell of the ring changes."""
        slots = jnp.where(i[:, 0] < 0, -1, i[:, 0] % self.size)
        written = replace(blocks, arrays=kernels.cells.write_one(blocks, slots, cells, axis=0))
        return written.arrays, self.read_in_place(written, i, queries, shared)

    def read_in_place(self, blocks: Blocks, i, queries, shared):
        """One token of each sequence reads the ring."""

        def token(i, query, block):
            return self._read(i, query, self._in_order(block, i + 1), shared)

        return one_token(token, blocks, i, queries)

    def _in_order(self, block, stop):
        """The ring in the order of positions, the last one before `stop`."""
        places = (stop + jnp.arange(self.size, dtype=jnp.int32)) % self.size
        return jax.tree.map(lambda x: jnp.take(x, places, axis=0), block)

    def _read(self, i, query, cells, shared):
        places = jnp.arange(self.size - 1, -1, -1, dtype=jnp.int32)
        visible = jnp.maximum(i, 0) - places >= 0  # padding sees its own cell, as in Cells
        return where(i >= 0, self.read(query, cells, visible, shared), 0)


def _later(before, new, n):
    """The `before` and `new` tokens, as many as the new ones, `n` places later than those.

    Written so that tokens on several devices need their neighbours' only.
    """
    length, rest = len(new), [(0, 0, 0)] * (new.ndim - 1)
    moved = jax.lax.pad(new, new.dtype.type(0), [(n, -n, 0), *rest])
    first = before[len(before) - n :][:length]
    first = jax.lax.pad(first, new.dtype.type(0), [(0, length - len(first), 0), *rest])
    is_first = (jnp.arange(length) < n).reshape(-1, *[1] * (new.ndim - 1))
    return jnp.where(is_first, first, moved)


def one_token(token, blocks: Blocks, i, queries):
    """`token(i, query, block) -> z` for one token of each sequence: z with the axes [B, 1]."""
    block = blocks.take_as_it_lies()
    if not blocks.batched:
        z = token(i[0, 0], jax.tree.map(lambda x: x[0, 0], queries), block)
        return jax.tree.map(lambda x: x[None, None], z)
    shared_i = i.shape[0] == 1
    over_rows = jax.vmap(token, in_axes=(None if shared_i else 0, 0, 0))
    queries = jax.tree.map(lambda x: x[:, 0], queries)
    z = over_rows(i[0, 0] if shared_i else i[:, 0], queries, block)
    return jax.tree.map(lambda x: x[:, None], z)


def flat(x):
    """Cells [B, S or T, ...] as a kernel takes them: [B, 1, S or T, numbers of a cell]."""
    return x.reshape(*x.shape[:2], -1)[:, None]


def _leaf(block):
    return jax.tree.leaves(block)[0]


def _write(block, i, cells):
    """Writes cells [B, T, ...] into blocks [B, S, ...] at consecutive places i [B or 1, T]."""
    write = lambda x, new: kernels.cells.write(flat(x), i, flat(new.astype(x.dtype)))
    return jax.tree.map(lambda x, new: write(x, new).reshape(x.shape), block, cells)
