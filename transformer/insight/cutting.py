"""Memories in which a query does not see some of the cells.

What a token must not see goes with its query, as flags, one for each cut; the positions of each
cut's cells are shared. So the same memory serves every mode: its law holds as that of the memory
below does, since what is hidden depends on the token and on positions, and on nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.insight.cells import seen
from transformer.insight.edits import Cut
from transformer.insight.positions import among
from transformer.insight.weights import heads, weights
from transformer.memory.cells import Cells, Window
from transformer.memory.delta import DeltaRule
from transformer.memory.fold import Fold
from transformer.memory.latent import Latent
from transformer.memory.memory import Memory, over_rows, where
from transformer.memory.softmax import Softmax

STATES = (Fold, DeltaRule)


class Hiding(NamedTuple):
    """A query with what it must not see.

    Attributes:
      query: the query.
      i: scalar int32, the position of the token.
      flags: [C, N] or [C, 1] bool, which cuts are about the token, and which of its heads.
    """

    query: Any
    i: jax.Array
    flags: jax.Array


class Hidden(NamedTuple):
    """What all tokens share, and the positions of the cells of each cut: [M], or None for all."""

    shared: Any
    cells: tuple[jax.Array | None, ...]


def hides(hidden: Hidden, flags, positions):
    """Which cells are hidden: flags [C, N], positions [S] -> [N, S] bool."""
    every = [
        flag[:, None] & among(positions, x) for flag, x in zip(flags, hidden.cells, strict=True)
    ]
    return jnp.any(jnp.stack(every), axis=0)


def hide(memory: Memory, query, i, shared, cuts: Sequence[Cut], applies: Sequence):
    """The memory, query and shared of an instruction in which cells are hidden.

    Args:
      memory, query, shared: those of the instruction, for one token.
      i: the token's position.
      cuts: edits of its block.
      applies: for each cut a bool, whether it is about this block, where blocks are stacked.

    Raises:
      ValueError: the memory keeps no cells that could be hidden, or no heads.
    """
    if isinstance(memory, Softmax | Latent):
        memory, count = CutAttention(memory), jax.tree.leaves(query)[0].shape[0]
    elif isinstance(memory, Cells | Window):
        size = memory.size if isinstance(memory, Window) else None
        read = CutRead(memory.read, size)
        memory, count = Cells(read) if size is None else Window(size, read), None
    else:
        raise ValueError(
            f"block {cuts[0].block} is kept by {memory}, which has no cells that some queries "
            "could see and others not. Cut all queries (None) off from a cell of a Fold or a "
            "DeltaRule, or change the cell itself: replace(block, at, value)."
        )
    flags = [
        applies & among(i, cut.queries) & _heads(cut, count)
        for cut, applies in zip(cuts, applies, strict=True)
    ]
    hidden = Hidden(shared, tuple(cut.cells for cut in cuts))
    return memory, Hiding(query, i, jnp.stack(flags)), hidden


def shown(memory: Memory, query, shared):
    """What an instruction was before its cells were hidden: -> (memory, query, shared)."""
    if not isinstance(query, Hiding):
        return memory, query, shared
    if isinstance(memory, CutAttention):
        return memory.memory, query.query, shared.shared
    read = memory.read.read
    below = Cells(read) if memory.read.size is None else Window(memory.size, read)
    return below, query.query, shared.shared


def never_written(memory: Memory, cell):
    """The cell that leaves a state as it is; the memory is one of `STATES`."""
    if isinstance(memory, Fold):
        return memory.empty(None, cell)
    k, v, log_decay, strength = cell
    return k, v, jnp.zeros_like(log_decay), jnp.zeros_like(strength)


def _heads(cut, count):
    """Which of N heads a cut is about: [N] bool, or [1] where heads do not matter."""
    if count is None:
        if cut.heads is not None:
            raise ValueError(
                f"heads={list(cut.heads)}: the cells of block {cut.block} are read by a function "
                "of its own, which has no heads that are known; cut it with heads=None."
            )
        return jnp.ones(1, bool)
    if cut.heads is None:
        return jnp.ones(count, bool)
    if max(cut.heads, default=0) >= count:
        raise ValueError(
            f"heads={list(cut.heads)}; block {cut.block} has the query heads 0 to {count - 1}."
        )
    return jnp.isin(jnp.arange(count), jnp.asarray(cut.heads, jnp.int32))


@dataclass(frozen=True)
class CutRead:
    """A read of `Cells`, or of a `Window` of some size, that does not see what is hidden."""

    read: Callable
    size: int | None = None

    def __call__(self, query: Hiding, cells, visible, hidden: Hidden):
        """As the read of a memory."""
        positions = jnp.arange(len(visible), dtype=jnp.int32)
        if self.size is not None:
            positions += query.i - self.size + 1
        left = visible & ~hides(hidden, query.flags, positions)[0]
        # Where nothing is left the read sees all, since one of nothing may make a nan.
        z = self.read(query.query, cells, jnp.where(left.any(), left, visible), hidden.shared)
        return where(left.any(), z, 0)


@dataclass(frozen=True)
class CutAttention(Memory):
    """`Softmax` or `Latent`, where a query may not see some of the cells.

    What such a query reads comes from weights by the formula; other queries read what they always
    do, to the bit.
    """

    memory: Softmax | Latent

    def empty(self, capacity, cell):
        """As of the memory below."""
        return self.memory.empty(capacity, cell)

    def step(self, block, i, cell, query, hidden):
        """As of the memory below; then the read is mended."""
        after, z = self.memory.step(block, i, cell, query.query, hidden.shared)
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        return after, self._mend(block, *one((i, cell, query, z)), hidden)[0]

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, hidden):
        """T tokens of one sequence."""
        after, z = self.memory.chunk(block, i, cells, queries.query, hidden.shared)
        return after, self._mend(block, i, cells, queries, z, hidden)

    def documents(self, capacity, block, i, cells, queries, hidden):
        """Rows of packed documents."""
        given = block, i, cells, queries.query, hidden.shared
        after, z = self.memory.documents(capacity, *given)
        mend = lambda block, i, cells, queries_z, hidden: self._mend(
            block, i, cells, *queries_z, hidden, packed=True
        )
        return after, over_rows(mend, block, i, cells, (queries, z), hidden)

    def _mend(self, block, i, cells, queries, z, hidden, packed=False):
        """What T tokens of one sequence read, z [T, N, Hv] where nothing is hidden from them."""
        near = seen(self.memory, block, i, cells, packed)
        of = heads(self.memory, queries.query, near.cells, hidden.shared)
        hide = jax.vmap(lambda flags: hides(hidden, flags, near.positions))(queries.flags)
        visible = near.visible[:, None]
        left = weights(self.memory, of, i[:, None] - near.positions, visible & ~hide)
        mended = jnp.einsum("tns,snh->tnh", left, of.v, precision="highest")
        return jnp.where((visible & hide).any(-1)[..., None], mended.astype(z.dtype), z)
