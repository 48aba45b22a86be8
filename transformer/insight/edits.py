"""What can be changed in a program: a cell, a query, what was read, and which cells a query sees.

Every edit names a block by its number, from 0 (where layers are scanned, as if they were not), and
the positions of the tokens that it is about: one, several, or None for all. Positions are those
within a document where documents are packed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.checks import whole_number
from transformer.insight.positions import among, first, last, positions
from transformer.memory.memory import where

OF = ("cell", "query", "read")


@dataclass(frozen=True, eq=False)
class Change:
    """An edit of what tokens write, ask or read.

    Attributes:
      block: the number of the block.
      of: "cell", "query" or "read".
      at: [M] int32, the positions of the tokens; None: all.
      function: function(x, i) -> x, for the token at position i.
      read: which read of the block, of a query or a read; None: every one.
    """

    block: int
    of: str
    at: np.ndarray | jax.Array | None
    function: Callable
    read: int | None = None

    def __post_init__(self):
        whole_number("block", self.block)
        _check_read(self.read)
        if self.of not in OF:
            raise ValueError(f"of={self.of!r}; an edit is of one of {', '.join(OF)}.")
        if self.of == "cell" and self.read is not None:
            raise ValueError(
                f"read={self.read}, and the edit is of a cell, which is the same in every read; "
                "say of='query' or of='read', or leave it out."
            )

    @property
    def begins(self) -> int:
        """The first position at which the edit does anything."""
        return first(self.at)

    @property
    def last(self) -> int:
        """The last position that it names."""
        return last(self.at)

    def __call__(self, x, i, here):
        """x of the token at position i, changed where `here` and where the edit is about it."""
        if not jax.tree.leaves(x):
            raise ValueError(
                f"an edit is of a {self.of} of block {self.block}, which has none: there is "
                "nothing that it could change."
            )
        new = self.function(x, i)
        _require_alike(self, new, x)
        new = jax.tree.map(lambda new, x: jnp.asarray(new).astype(x.dtype), new, x)
        return where(here & among(i, self.at), new, x)


@dataclass(frozen=True, eq=False)
class Cut:
    """An edit of which cells a query sees.

    Attributes:
      block: the number of the block.
      queries: [M] int32, the positions of the tokens that ask; None: all.
      cells: [M] int32, the positions of the cells that they do not see; None: all.
      heads: the query heads that do not see them; None: all.
      read: which read of the block; None: every one.
    """

    block: int
    queries: np.ndarray | jax.Array | None
    cells: np.ndarray | jax.Array | None
    heads: tuple[int, ...] | None = None
    read: int | None = None

    @property
    def begins(self) -> int:
        """The first position at which the edit does anything."""
        return max(first(self.queries), first(self.cells))

    @property
    def last(self) -> int:
        """The last position that it names."""
        return max(last(self.queries), last(self.cells))


def cut(
    block: int,
    queries: int | Sequence[int] | None,
    cells: int | Sequence[int] | None,
    heads: int | Sequence[int] | None = None,
    *,
    read: int | None = None,
) -> Cut:
    """Makes cells invisible to queries: attention knockout.

    The weights of the cells that are left are those of a softmax over them alone. A query that
    sees no cell reads zeros. A state (`Fold`, `DeltaRule`) keeps no cells apart, so that there only
    all queries (None) can be cut off from a cell: it is then not written.

    Args:
      block: the number of the block.
      queries: positions of the tokens that ask; None: all.
      cells: positions of the cells that they do not see; None: all.
      heads: query heads of attention that do not see them; None: all.
      read: as in `edit`.
    """
    block = whole_number("block", block)
    _check_read(read)
    if heads is not None:
        heads = [heads] if np.ndim(heads) == 0 else heads
        heads = tuple(whole_number("heads", head) for head in heads)
    return Cut(block, positions("queries", queries), positions("cells", cells), heads, read)


def patch(block: int, cells: int | Sequence[int], values: Any) -> Change:
    """Writes other cells in the place of a token's own: activation patching.

    Args:
      block: the number of the block.
      cells: positions of the cells, M of them.
      values: what is written, the block's cells with a leading axis M, such as
        `jax.tree.map(lambda x: x[cells], trace.cells[block])` of another prompt.
    """
    at = positions("cells", cells)
    if at is None:
        raise TypeError("cells=None; a patch names the positions of its cells.")
    for x in jax.tree.leaves(values):
        if jnp.shape(x)[:1] != at.shape:
            raise ValueError(
                f"a patch of {len(at)} cells takes values with a leading axis of {len(at)}, and "
                f"one of them has the shape {list(jnp.shape(x))}."
            )
    if isinstance(at, np.ndarray) and len(np.unique(at)) < len(at):
        raise ValueError(f"cells={at.tolist()}; a patch writes each cell once.")
    if not len(at):  # of nobody
        return edit(block, at, lambda x: x)
    one = lambda i: jnp.argmax(at == i)
    return Change(
        block, "cell", at, lambda _, i: jax.tree.map(lambda x: jnp.asarray(x)[one(i)], values)
    )


def replace(block: int, at, value, *, of: str = "cell", read: int | None = None) -> Change:
    """Puts a value in the place of a cell, a query or a read.

    Args:
      block: the number of the block.
      at: positions of the tokens; None: all.
      value: a pytree like one cell (or query, or read) of the block; a single number stands for
        all of its numbers, so that 0 erases.
      of, read: as in `edit`.
    """
    return edit(block, at, lambda x: _spread(block, of, value, x), of=of, read=read)


def scale(block: int, at, factor, *, of: str = "cell", read: int | None = None) -> Change:
    """Multiplies a cell, a query or a read by a number, or by a pytree like it; see `replace`."""
    times = lambda x: jax.tree.map(jnp.multiply, x, _spread(block, of, factor, x))
    return edit(block, at, times, of=of, read=read)


def add(block: int, at, value, *, of: str = "cell", read: int | None = None) -> Change:
    """Adds a number, or a pytree like it, to a cell, a query or a read: steering; see `replace`."""
    plus = lambda x: jax.tree.map(jnp.add, x, _spread(block, of, value, x))
    return edit(block, at, plus, of=of, read=read)


def edit(
    block: int, at, function: Callable, *, of: str = "cell", read: int | None = None
) -> Change:
    """Changes a cell, a query or a read by a function of one's own.

    Args:
      block: the number of the block.
      at: positions of the tokens; None: all.
      function: function(x) -> x, of one token: a pytree in, the same structure and shapes out.
      of: "cell", "query" or "read".
      read: which read of the block, where it is read several times: 0 comes with writing it, and
        then come those that read it again; None: every one.
    """
    if not callable(function):
        raise TypeError(f"function={function!r}; an edit is a function(x) -> x, or see `replace`.")
    return Change(block, of, positions("at", at), lambda x, i: function(x), read)


def _check_read(read):
    if read is not None:
        whole_number("read", read)


def _spread(block, of, value, x):
    """A value like x; one number stands for all numbers of x."""
    value = jax.tree.map(jnp.asarray, value)
    if jax.tree.structure(value) == jax.tree.structure(0) and jnp.ndim(value) == 0:
        return jax.tree.map(lambda x: jnp.full_like(x, value), x)
    if not _alike(value, x):
        raise ValueError(
            f"a {of} of block {block} has the shapes {_shapes(x)}, and an edit gives one of shapes "
            f"{_shapes(value)}; give one like it, or one number for all of it."
        )
    return value


def _require_alike(change, new, x):
    if not _alike(new, x):
        raise ValueError(
            f"an edit of a {change.of} of block {change.block} made {_shapes(new)} of one of "
            f"shapes {_shapes(x)}; the structure and the shapes must stay as they are."
        )


def _alike(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and _shapes(a) == _shapes(b)


def _shapes(tree):
    return jax.tree.map(lambda x: list(jnp.shape(x)), tree)
