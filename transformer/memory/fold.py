"""Memories that keep a state: what all cells so far amount to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.memory.memory import Memory, over_rows, where, where_tokens


@dataclass(frozen=True, eq=False)
class Fold(Memory):
    """The cells so far, combined by an associative function: linear attention, state spaces.

    A block is one state, with the shapes of a cell: cells and states are elements of the same kind.
    Under the parallel mode states come from an associative scan, so its memory holds a state for
    each token.

    Attributes:
      combine: `combine(a, b) -> c`, an associative function of two elements, a before b.
      read: `read(query, state, shared) -> z`, for one query; the state includes the token's own
        cell.
      identity: the element e with combine(e, x) = combine(x, e) = x: a pytree of numbers or arrays
        that broadcasts to a cell's shapes (one number stands for all leaves), or a function of a
        cell's shapes that returns it.
    """

    combine: Callable
    read: Callable
    identity: Any = 0

    def empty(self, capacity, cell):
        """Returns the identity."""
        identity = self.identity(cell) if callable(self.identity) else self.identity
        fill = lambda e, x: jnp.broadcast_to(jnp.asarray(e, x.dtype), x.shape)
        if jax.tree.structure(identity) == jax.tree.structure(0):
            return jax.tree.map(lambda x: fill(identity, x), cell)
        return jax.tree.map(fill, identity, cell)

    def step(self, block, i, cell, query, shared):
        """Combines the state with the cell, and reads."""
        cell = _cast(cell, block)
        state = self.combine(where(i == 0, self.empty(None, cell), block), cell)
        z = self.read(query, state, shared)
        return where(i >= 0, _cast(state, block), block), where(i >= 0, z, 0)

    def chunk(self, block, i, cells, queries, shared):
        """The states of all tokens by an associative scan, then all reads."""
        return self._chunk(block, i, cells, queries, shared, packed=False)

    def documents(self, capacity, block, i, cells, queries, shared):
        """Rows of packed documents: the scan begins anew at each position 0."""
        chunk = lambda *operands: self._chunk(*operands, packed=True)
        return over_rows(chunk, block, i, cells, queries, shared)

    def depth(self, length):
        """The levels of the associative scan, log2(length)."""
        return max(1, (length - 1).bit_length())

    def _chunk(self, block, i, cells, queries, shared, packed):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cells)
        identity = _cast(self.empty(None, one), block)
        cells = jax.vmap(lambda real, cell: where(real, cell, identity))(
            i >= 0, _cast(cells, block)
        )
        first = where(i[0] == 0, identity, block)
        if len(i) == 1:
            return self._token(first, i[0], *jax.tree.map(lambda x: x[0], (cells, queries)), shared)
        elements = jax.tree.map(lambda x, new: jnp.concatenate([x[None], new]), first, cells)
        combine = jax.vmap(self.combine)
        if packed:
            begins = jnp.concatenate([jnp.zeros(1, bool), i == 0])
            _, states = jax.lax.associative_scan(_segmented(combine), (begins, elements))
        else:
            states = jax.lax.associative_scan(combine, elements)
        states = jax.tree.map(lambda x: x[1:], states)
        z = jax.vmap(self.read, in_axes=(0, 0, None))(queries, states, shared)
        last = _cast(jax.tree.map(lambda x: x[-1], states), block)
        return where((i >= 0).any(), last, block), where_tokens(i, z)

    def _token(self, block, i, cell, query, shared):
        """One token, of which padding is the identity: the state is used once, and in place."""
        state = _cast(self.combine(block, cell), block)
        z = where(i >= 0, self.read(query, state, shared), 0)
        return state, jax.tree.map(lambda x: x[None], z)

    def _key(self):
        """What makes two folds equal; arrays in the identity are compared by their bytes."""
        leaves, tree = jax.tree.flatten(self.identity)
        fixed = lambda x: x if callable(x) else (np.shape(x), np.asarray(x).tobytes())
        return self.combine, self.read, tree, tuple(map(fixed, leaves))

    def __hash__(self):
        return hash(self._key())

    def __eq__(self, other):
        return type(other) is type(self) and self._key() == other._key()


def _segmented(combine):
    """The combination of (begins, element) in which an element that begins forgets what was."""

    def of_pairs(a, b):
        (a_begins, x), (b_begins, y) = a, b
        return a_begins | b_begins, jax.vmap(where)(b_begins, y, combine(x, y))

    return of_pairs


def _cast(tree, like):
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, like)
