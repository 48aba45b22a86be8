"""The cache, and one token's turn on it.

The cache is an ordered tuple of blocks, immutable. A program begins a turn with the position of its
token, goes through the blocks in order, writing and reading each by one `write_read`, and ends the
turn, which gives the new cache. Nothing else can reach a block, and what breaks a rule is an error
while the program is traced.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from transformer.memory import instruction
from transformer.memory.instruction import Operands
from transformer.memory.memory import Memory
from transformer.memory.rules import ProgramError, Rule

RULE = "A program calls write_read exactly once for each block, in order."


@struct.dataclass
class Cache:
    """The blocks of one sequence.

    Attributes:
      capacity: how many positions fit.
      repeats: how many repeats of the blocks are stacked, for layers that run as one compiled loop
        (`Turn.scan`): every array of a block then has a leading axis of that size. None: the
        blocks are not stacked.
      packed: whether positions may begin again at 0 within a chunk, for documents packed in one
        row. `schedule.parallel` sets it.
      edited_by: the program under edits that filled the cache, so that it can tell that its edits
        applied to all that is in it; None: another program did, or none.
    """

    _blocks: tuple[Any, ...]
    capacity: int = struct.field(pytree_node=False)
    repeats: int | None = struct.field(pytree_node=False, default=None)
    packed: bool = struct.field(pytree_node=False, default=False)
    edited_by: Callable | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def empty(cls, capacity: int, blocks: Sequence, *, repeats: int | None = None) -> Cache:
        """Makes the cache of a sequence that has no token yet.

        Args:
          capacity: how many positions must fit, at least 1.
          blocks: for each block in order a pair (memory, cell): a `Memory`, and a pytree of the
            shapes of one cell, each a `jax.ShapeDtypeStruct`, an array, or a tuple of ints, which
            mean float32.
          repeats: as in `Cache`; None: blocks are not stacked.

        Raises:
          ValueError: capacity is below 1, there is no block, or a cell does not fit its memory.
          TypeError: a block is not a pair of a memory and shapes.
        """
        capacity = operator.index(capacity)
        if capacity < 1:
            raise ValueError(f"capacity={capacity}; a cache holds at least 1 position.")
        if not blocks:
            raise ValueError("a cache has at least one block: (memory, shapes of its cell).")

        def block(pair):
            if not isinstance(pair, Sequence) or len(pair) != 2 or not is_memory(pair[0]):
                raise TypeError(
                    f"a block is given as (memory, shapes of its cell), and this one as {pair!r}."
                )
            made = pair[0].empty(capacity, cell_shapes(pair[1]))
            if repeats is None:
                return made
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), made)

        return cls(tuple(map(block, blocks)), capacity, repeats)

    def begin(self, i) -> Turn:
        """Begins the turn of the token at position i, a scalar int32; -1 marks padding.

        Raises:
          ValueError: i is not one integer.
        """
        if jnp.ndim(i) or not jnp.issubdtype(jnp.result_type(i), jnp.integer):
            raise ValueError(
                f"a turn begins at one position, an integer, and i is {jnp.result_type(i)} of "
                f"shape {jnp.shape(i)}; use jax.vmap for several tokens."
            )
        return Turn(jnp.asarray(i, jnp.int32), self)


@struct.dataclass
class Turn:
    """One token's turn on a cache: it alone can write and read.

    Attributes:
      i: scalar int32, the token's position.
      next: the number of the block that the next `write_read` touches.
    """

    i: jax.Array
    _cache: Cache
    next: int = struct.field(pytree_node=False, default=0)
    _layer: jax.Array | None = None
    _written: tuple = ()

    def write_read(self, memory: Memory, cell, query, shared=None):
        """The instruction: writes cell i of the next block, then reads cells 0..i of it.

        Args:
          memory: what writing and reading mean.
          cell: a pytree, what this token writes.
          query: a pytree, what it reads with.
          shared: a pytree that all tokens have in common, such as a learned sink.

        Returns:
          (turn, z): the turn, at the next block, and what was read.

        Raises:
          ProgramError: all blocks have been written.
          ValueError: the cell or the memory does not fit the block.
          TypeError: memory is not a `Memory`.
        """
        blocks = self._cache._blocks
        if self.next == len(blocks):
            raise ProgramError(
                f"write_read was called {self.next + 1} times, and the cache has {len(blocks)} "
                f"blocks. {RULE}"
            )
        self._require_stack()
        before = blocks[self.next]
        cell = jax.tree.map(jnp.asarray, cell)
        self._check_fit(self.next, memory, cell, before)
        operands = Operands(before, self._layer, self.i, cell, query, shared)
        after, z = instruction.write_read(memory, operands, self._packed)
        blocks = (*blocks[: self.next], after, *blocks[self.next + 1 :])
        return self.replace(
            _cache=self._cache.replace(_blocks=blocks),
            next=self.next + 1,
            _written=(*self._written, (before, cell)),
        ), z

    def read(self, n: int, memory: Memory, query, shared=None):
        """Reads block n again, cells 0..i of it, which this token has written.

        Args:
          n: the number of the block, from 0; below the number of blocks written.
          memory, query, shared: as in `write_read`; the memory must keep its blocks as the one
            that wrote the block does.

        Returns:
          What was read, z.

        Raises:
          ProgramError: this token has not written block n yet.
          ValueError, TypeError: as in `write_read`.
        """
        if not 0 <= operator.index(n) < self.next:
            raise ProgramError(
                f"read of block {n}, and this token has written {self.next} of "
                f"{len(self._cache._blocks)} blocks. A program reads again only what it has "
                "written: an earlier token's cell of a later block is not there yet when all "
                "tokens run at once.",
                Rule.WRITTEN,
                n,
            )
        before, cell = self._written[n]
        after = self._cache._blocks[n]
        self._check_fit(n, memory, cell, after)
        operands = Operands((before, after), self._layer, self.i, cell, query, shared)
        return instruction.read(memory, operands, self._packed)

    def scan(self, layers: Callable, x, params):
        """Runs the layers of all repeats as one compiled loop, on a cache of stacked blocks.

        Args:
          layers: `layers(turn, x, params) -> (turn, x)`, one repeat: it writes each block once.
          x: a pytree, what one repeat hands to the next.
          params: a pytree whose arrays have a leading axis, one element for each repeat.

        Returns:
          (turn, x) after the last repeat, all blocks written.

        Raises:
          ProgramError: a repeat does not write each block once, or some block has been written
            before.
          ValueError: the cache has no stacked blocks, or the parameters another number of repeats.
        """
        cache = self._cache
        if cache.repeats is None:
            raise ValueError(
                "turn.scan runs on stacked blocks, and this cache has none; make it with "
                "Cache.empty(..., repeats=...)."
            )
        if self.next:
            raise ProgramError(f"turn.scan begins at block 0, and this turn is at {self.next}.")
        sizes = {jnp.shape(p)[:1] for p in jax.tree.leaves(params)}
        if sizes - {(cache.repeats,)}:
            raise ValueError(
                f"the cache has {cache.repeats} repeats of its blocks, and the parameters of the "
                f"layers have {sorted(size[0] if size else None for size in sizes)}; both must be "
                "made for the same number of layers."
            )

        def repeat(carry, inputs):
            blocks, x = carry
            layer, params = inputs
            turn = Turn(self.i, cache.replace(_blocks=blocks), _layer=layer)
            turn, x = layers(turn, x, params)
            _require_turn(turn)
            if turn.next != len(blocks):
                raise ProgramError(
                    f"a repeat of the layers ended after {turn.next} of {len(blocks)} blocks: "
                    f"write_read was not called for block {turn.next}. {RULE}",
                    block=turn.next,
                )
            return (turn._cache._blocks, x), None

        repeats = jnp.arange(cache.repeats, dtype=jnp.int32)
        (blocks, x), _ = jax.lax.scan(repeat, (cache._blocks, x), (repeats, params))
        return self.replace(_cache=cache.replace(_blocks=blocks), next=len(blocks)), x

    def end(self) -> Cache:
        """Ends the turn and returns the cache.

        Raises:
          ProgramError: some blocks were not written.
        """
        count = len(self._cache._blocks)
        if self.next != count:
            raise ProgramError(
                f"the program ended after {self.next} of {count} blocks: write_read was not called "
                f"for block {self.next}. {RULE}",
                block=self.next,
            )
        if self._layer is not None:
            raise ProgramError(
                "turn.end() inside of turn.scan would end the token in the middle of its layers; "
                "return (turn, x) there, and end the turn after the scan."
            )
        return self._cache

    @property
    def _packed(self):
        return self._cache.capacity if self._cache.packed else None

    def _require_stack(self):
        if (self._cache.repeats is None) != (self._layer is None):
            raise ProgramError(
                f"the blocks of this cache are stacked for {self._cache.repeats} repeats; write "
                "and read them inside of turn.scan(layers, x, params)."
            )

    def _check_fit(self, n, memory, cell, block):
        """Refuses a cell or a memory that does not go with block n."""
        if not is_memory(memory):
            raise TypeError(
                f"write_read and read take a Memory, and got {memory!r} of type "
                f"{type(memory).__name__}."
            )
        stacked = self._layer is not None
        shape = lambda x: jax.ShapeDtypeStruct(x.shape[stacked:], x.dtype)
        block = jax.tree.map(shape, block)
        expected = _empty_shapes(memory, self._cache.capacity, cell)
        if not _alike(block, expected):
            raise ValueError(
                f"block {n} holds {_describe(block)}, and {memory} keeps cells "
                f"{_describe(cell)} as {_describe(expected)} (capacity {self._cache.capacity}): "
                "program and cache do not belong together. Make the cache for this program, as "
                "with init_cache(config, capacity)."
            )


def check_turn_ended(before: Cache, after) -> None:
    """Checks that one whole turn has run, under the same trace, between two caches.

    Raises:
      ProgramError: the program returned no cache, or one in which some block is as it was.
    """
    if isinstance(after, Turn):
        raise ProgramError(
            f"the program returned a turn at block {after.next}; return turn.end(), the cache."
        )
    if not isinstance(after, Cache):
        raise ProgramError(
            f"the program returned {type(after).__name__} where the cache belongs; it returns "
            "(turn.end(), logits)."
        )
    for n, (old, new) in enumerate(zip(before._blocks, after._blocks, strict=True)):
        if any(x is y for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)):
            raise ProgramError(
                f"the program returned a cache in which block {n} is as it was: write_read was "
                f"not called for it. {RULE}",
                block=n,
            )


def cell_shapes(cell):
    """A pytree of shapes as `jax.ShapeDtypeStruct`s; a tuple of ints is a shape of float32."""
    is_shape = lambda x: isinstance(x, tuple | list) and all(type(n) is int for n in x)

    def struct_of(x):
        if is_shape(x) or type(x) is int:
            return jax.ShapeDtypeStruct(x if is_shape(x) else (x,), jnp.float32)
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))

    return jax.tree.map(struct_of, cell, is_leaf=is_shape)


def is_memory(x) -> bool:
    """Whether x says how a block is written and read."""
    return isinstance(x, Memory)


def _empty_shapes(memory, capacity, cell):
    leaves, tree = jax.tree.flatten(cell)
    leaves = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return _empty_shapes_of(memory, capacity, tree, leaves)


@functools.lru_cache(maxsize=256)
def _empty_shapes_of(memory, capacity, tree, leaves):
    return jax.eval_shape(lambda: memory.empty(capacity, jax.tree.unflatten(tree, leaves)))


def _alike(block, expected):
    """Whether two blocks have the same shapes and the same kinds of numbers."""
    if jax.tree.structure(block) != jax.tree.structure(expected):
        return False
    kind = lambda x: "floating" if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    pairs = zip(jax.tree.leaves(block), jax.tree.leaves(expected), strict=True)
    return all(x.shape == y.shape and kind(x) == kind(y) for x, y in pairs)


def _describe(tree):
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)).replace("'", "")


def _require_turn(turn):
    if not isinstance(turn, Turn):
        raise ProgramError(
            f"turn.scan's layers returned {type(turn).__name__} where the turn belongs; they "
            "return (turn, x)."
        )
