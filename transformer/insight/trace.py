"""All that the tokens of a sequence tell each other, kept: every cell, query and read."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kernels.blocks import Blocks
from transformer.checks import whole_number
from transformer.insight.cells import Seen, seen
from transformer.insight.cutting import Hidden, Hiding, hides, shown
from transformer.insight.intervene import Intervened, with_edits
from transformer.insight.positions import token_index
from transformer.insight.weights import heads, weights
from transformer.memory.cache import Cache
from transformer.memory.instruction import POSITIONS
from transformer.memory.latent import Latent
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import checked

# The fields of a `Reading` that have a leading axis of tokens.
OF_TOKEN = ("cells", "queries", "z", "flags")


@struct.dataclass
class Reading:
    """One instruction, of all T tokens.

    Attributes:
      cells, queries, z: pytrees with a leading axis T: what each token wrote, asked and read.
      flags: [T, C, N] bool, where cells were hidden from queries (`cut`), else None: which of the
        cuts are about a token, and which of its heads.
      shared: a pytree, what all tokens had in common.
      before: the block before the tokens ran.
      hidden: of each of the C cuts the positions of its cells, None for all.
      block: the number of the block.
      memory: what writing and reading mean.
      read: which read of the block it is: 0 came with writing it, from 1 it was read again.
    """

    cells: Any
    queries: Any
    z: Any
    flags: jax.Array | None
    shared: Any
    before: Any
    hidden: tuple
    block: int = struct.field(pytree_node=False)
    memory: Memory = struct.field(pytree_node=False)
    read: int = struct.field(pytree_node=False)

    @property
    def again(self) -> bool:
        """Whether the block was read again, after another instruction had written it."""
        return self.read > 0


@struct.dataclass
class Trace:
    """A run of T tokens of one sequence, and how information moved between them.

    Attributes:
      tokens: [T] int32.
      positions: [T] int32.
      logits: [T, V].
      cache: after the last token.
      instructions: every instruction, in order.
      start: position of the first token.
    """

    tokens: jax.Array
    positions: jax.Array
    logits: jax.Array
    cache: Cache
    instructions: tuple[Reading, ...]
    start: int = struct.field(pytree_node=False, default=0)

    @property
    def length(self) -> int:
        """How many positions there are up to the last token's."""
        return self.start + len(self.tokens)

    @property
    def written(self) -> tuple[Reading, ...]:
        """The instructions that wrote the blocks, one for each."""
        return tuple(x for x in self.instructions if not x.again)

    @property
    def cells(self) -> tuple:
        """Of each block what the tokens wrote: pytrees with a leading axis T."""
        return tuple(x.cells for x in self.written)

    @property
    def queries(self) -> tuple:
        """Of each block what tokens read it with when they wrote it: pytrees with an axis T."""
        return tuple(x.queries for x in self.written)

    @property
    def reads(self) -> tuple:
        """Of each block what the tokens read, when they wrote it: pytrees with a leading axis T."""
        return tuple(x.z for x in self.written)

    def weights(self, block: int, queries=None, *, read: int = 0):
        """The weights of attention of a block: how much of which cell each query head reads.

        They are made when they are asked for, T x S numbers for each head; for long sequences, ask
        for the queries that matter, or take them in tiles (`tiles`).

        Args:
          block: the number of the block.
          queries: which tokens of the trace, as an index into T: a slice or a list; None: all.
          read: which read of the block: 0 is the one that came with writing it; then come those
            that read it again, as of layers that share keys and values.

        Returns:
          [N, queries, S], S the positions from 0 to the last token's.

        Raises:
          ValueError: there is no such block, token or read, or the block's memory has no weights.
        """
        near, _, weights = attention(self.reading(block, read), self.positions, queries)
        return by_position(near, weights, self.length).swapaxes(0, 1)

    def tiles(self, block: int, size: int = 128, *, read: int = 0):
        """`weights` for `size` queries at a time: pairs (slice of T, weights)."""
        for begin in range(0, len(self.tokens), whole_number("size", size, least=1)):
            queries = slice(begin, min(begin + size, len(self.tokens)))
            yield queries, self.weights(block, queries, read=read)

    def reading(self, block: int, read: int = 0) -> Reading:
        """An instruction: the one that wrote a block, or a later `read` of it, from 1.

        Raises:
          ValueError: there is none.
        """
        count, block, read = len(self.written), operator.index(block), whole_number("read", read)
        if not -count <= block < count:
            raise ValueError(f"block {block} was not traced; there are blocks 0 to {count - 1}.")
        reads = [x for x in self.instructions if x.block == block % count]
        if read >= len(reads):
            raise ValueError(f"read={read}; block {block} was read {len(reads)} times.")
        return reads[read]


def trace(f: Callable, params, cache: Cache, tokens, start: int = 0) -> Trace:
    """Runs a program in the parallel mode, and keeps every cell, query and read.

    A lawful program's tokens reach each other through cells only, so this is all that one token can
    have told another. It may run inside of `jax.jit`, and be differentiated.

    Args:
      f: a program, (params, cache, token, i) -> (cache, logits), or one that `intervene` made:
        what is kept is then what was written and read under the edits.
      params, cache, tokens, start: as in `run`.

    Returns:
      The trace: `trace.cells[b]`, `trace.queries[b]` and `trace.reads[b]` of block b, each with a
      leading axis T, and more. Where layers are scanned, blocks are numbered as if they were not.

    Raises:
      ValueError, TypeError, ProgramError: as `run`.
      NotImplementedError: an instruction is where it cannot be seen, as inside of a `while` loop.
    """
    cache, tokens = checked(f, cache, tokens, start)
    edits = f.edits if isinstance(f, Intervened) else ()
    program = with_edits(f.f if edits else f, edits, _record)

    def one(params, cache, token, i):
        (after, logits), records = program(params, cache, token, i)
        of_token = [tuple(getattr(x, name) for name in OF_TOKEN) for x in records]
        common = [x.replace(**dict.fromkeys(OF_TOKEN)) for x in records]
        return after, logits, of_token, common

    positions = start + jnp.arange(len(tokens), dtype=jnp.int32)
    over = jax.vmap(one, (None, None, 0, 0), (None, 0, 0, None), axis_name=POSITIONS)
    after, logits, of_token, common = over(params, cache, tokens, positions)
    readings = [
        x.replace(**dict(zip(OF_TOKEN, fields, strict=True)))
        for x, fields in zip(common, of_token, strict=True)
    ]
    return Trace(tokens, positions, logits, after, tuple(_one_by_one(readings, cache)), start)


def _record(instruction, z) -> Reading:
    """What is kept of an instruction of one token."""
    operands = instruction.operands
    arrays = operands.arrays[0] if instruction.again else operands.arrays
    memory, query, shared = shown(instruction.memory, operands.query, operands.shared)
    cut = isinstance(operands.query, Hiding)
    return Reading(
        cells=operands.cell,
        queries=query,
        z=z,
        flags=operands.query.flags if cut else None,
        shared=shared,
        before=Blocks(arrays, operands.layer).take_as_it_lies(),
        hidden=operands.shared.cells if cut else (),
        block=instruction.block,
        memory=memory,
        read=instruction.read,
    )


def _one_by_one(readings, cache):
    """The instructions in order; those of a loop over layers are taken apart."""
    if cache.repeats is None:
        return readings
    count = len(cache._blocks)

    def of_repeat(reading, n):
        common = jax.tree.map(lambda x: x[n], reading.replace(**dict.fromkeys(OF_TOKEN)))
        of_token = {name: getattr(reading, name) for name in OF_TOKEN}
        of_token = jax.tree.map(lambda x: x[:, n], of_token)
        return common.replace(**of_token, block=n * count + reading.block)

    return [of_repeat(reading, n) for n in range(cache.repeats) for reading in readings]


def attention(reading: Reading, positions, queries=None):
    """The attention of one instruction: -> (cells `Seen`, `Heads`, weights [queries, N, S]).

    Here the S cells are those of the block as it was, then those of the trace; see `by_position`.

    Args:
      reading: an instruction of a trace.
      positions: [T], those of the trace.
      queries: as in `Trace.weights`.

    Raises:
      ValueError: there is no such token, or the block's memory has no weights.
    """
    if not isinstance(reading.memory, Softmax | Latent):
        raise ValueError(
            f"block {reading.block} is kept by {reading.memory}, whose reads have no weights; "
            "transformer.insight.contributions tells how much of a read comes from which cell."
        )
    which = slice(None) if queries is None else token_index(queries, len(positions))
    pick = lambda tree: jax.tree.map(lambda x: x[which], tree)
    near = seen(reading.memory, reading.before, positions, reading.cells)
    of = heads(reading.memory, pick(reading.queries), near.cells, reading.shared)
    visible = pick(near.visible)[:, None]
    if reading.flags is not None:
        hidden = Hidden(reading.shared, reading.hidden)
        hide = jax.vmap(lambda flags: hides(hidden, flags, near.positions))
        visible &= ~hide(pick(reading.flags))
    distance = pick(positions)[:, None] - near.positions
    return near, of, weights(reading.memory, of, distance, visible)


def by_position(near: Seen, x, length: int):
    """x [..., S] of cells in a row, at the positions of the cells: [..., length]."""
    places = jnp.where(near.positions < 0, length, near.positions)  # an empty cell has none
    return jnp.zeros((*x.shape[:-1], length), x.dtype).at[..., places].add(x, mode="drop")
