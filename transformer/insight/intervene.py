"""A program whose cells, queries and reads are changed where they are made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax

from transformer.insight.cutting import STATES, hide, never_written
from transformer.insight.edits import Change, Cut
from transformer.insight.interpret import Instruction, interpret
from transformer.memory.cache import Cache


@dataclass(frozen=True, eq=False)
class Intervened:
    """A program under edits; `intervene` makes it. What else f has, such as its config, it has too.

    Attributes:
      f: the program.
      edits: what is changed, in order.
    """

    f: Callable
    edits: tuple[Change | Cut, ...]

    def __call__(self, params, cache, token, i):
        """Runs the token at position i."""
        if not isinstance(i, jax.core.Tracer) and i >= 0:
            cache = self.admit(cache, i)
        return self._program(params, cache, token, i)[0]

    def admit(self, cache: Cache, start) -> Cache:
        """A cache from which this program may go on at position `start`.

        Raises:
          ValueError: the cache was filled without an edit that is about a token in it. Where
            `start` is not known yet, as inside of `jax.jit`, nothing can be told.
        """
        if isinstance(start, jax.core.Tracer):
            return cache
        begins = min((edit.begins for edit in self.edits), default=start)
        if start > 0 and cache.edited_by is not self and begins < start:
            raise ValueError(
                f"an edit is about position {begins}, and the cache was filled up to {start - 1} "
                "without it: what tokens wrote then, and what others made of it, would be stale. "
                "Run this program from position 0, or edit positions "
                f"from {start} on."
            )
        return cache.replace(edited_by=self)

    def __getattr__(self, name):
        if name.startswith("_") or name in ("f", "edits"):
            raise AttributeError(name)
        return getattr(self.f, name)

    @cached_property
    def _program(self):
        return with_edits(self.f, self.edits, lambda instruction, z: None)


def intervene(f: Callable, edits: Sequence[Change | Cut]) -> Intervened:
    """Makes a program in which information flows otherwise.

    The edits apply to each token when it runs: to the cell that it writes, the query that it asks
    with, what it reads, and which cells it sees. So they hold in every mode and schedule, inside of
    `jax.jit`, `jax.grad` and `jax.vmap`, in training and in `generate`. Values of edits may be
    traced, and differentiated. An edit that changes nothing gives the same bits.

    Args:
      f: a program, (params, cache, token, i) -> (cache, logits), lawful.
      edits: what `transformer.insight` makes: `cut`, `patch`, `replace`, `scale`, `add`, `edit`.
        Several edits of the same thing apply in order. Where a block is read again, as by layers
        that share keys and values, its edits apply to every read, or to the one that they name.

    Returns:
      A program with the same signature.

    Raises:
      TypeError: f is no function, or something is not an edit.
      ValueError: when it runs: a block, a read of it or a position does not exist, an edit does not
        fit what it is about, or the block's memory cannot be cut so.
    """
    if not callable(f) or isinstance(edits, Change | Cut):
        raise TypeError("intervene takes a program, and then a list of edits: [cut(...), ...].")
    edits = tuple(edits)
    for edit in edits:
        if not isinstance(edit, Change | Cut):
            raise TypeError(
                f"an edit is made by a function of transformer.insight, such as cut or patch, and "
                f"this one is {edit!r}."
            )
    if isinstance(f, Intervened):
        f, edits = f.f, (*f.edits, *edits)
    return Intervened(f, edits)


def with_edits(f: Callable, edits: Sequence[Change | Cut], record: Callable) -> Callable:
    """Makes g(params, cache, token, i) -> ((cache, logits), records) of a program under edits.

    Args:
      f: a program.
      edits: in order.
      record: record(instruction, z) -> a pytree, of each instruction after its edits.
    """

    def g(params, cache, token, i):
        count = len(cache._blocks)
        total = count * (cache.repeats or 1)
        for edit in edits:
            if edit.block >= total:
                raise ValueError(
                    f"an edit is of block {edit.block}; the cache has the blocks 0 to {total - 1}."
                )
            if edit.last >= cache.capacity:
                raise ValueError(
                    f"an edit of block {edit.block} names position {edit.last}; the cache has "
                    f"those from 0 to {cache.capacity - 1}."
                )

        reads = [0] * count

        def take(instruction):
            reads[instruction.block] = instruction.read + 1
            own = [
                edit
                for edit in edits
                if edit.block % count == instruction.block and edit.read in (None, instruction.read)
            ]
            layer = instruction.operands.layer
            here = [layer is None or layer == edit.block // count for edit in own]
            instruction, z_edits = _edited(instruction, list(zip(own, here, strict=True)))
            arrays, z = instruction.run()
            for edit, here in z_edits:
                z = edit(z, instruction.operands.i, here)
            return instruction.operands.cell, arrays, z, record(instruction, z)

        results = interpret(f, take)(params, cache, token, i)
        for edit in edits:
            if edit.read is not None and edit.read >= reads[edit.block % count]:
                raise ValueError(
                    f"an edit is of read={edit.read} of block {edit.block}, which is read "
                    f"{reads[edit.block % count]} times; they count from 0."
                )
        return results

    return g


def _edited(instruction: Instruction, edits):
    """An instruction after its edits, and those that are left, of what it reads.

    edits: pairs (edit, whether it is about this block).
    """
    memory, operands = instruction.memory, instruction.operands
    cell, query, i = operands.cell, operands.query, operands.i
    cuts, of_reads = [], []
    for edit, here in edits:
        everyone = isinstance(edit, Cut) and edit.queries is None and edit.read is None
        if everyone and isinstance(memory, STATES):
            edit = Change(edit.block, "cell", edit.cells, lambda x, i: never_written(memory, x))
        if isinstance(edit, Cut):
            cuts.append((edit, here))
        elif edit.of == "cell":
            # Where the block is read again, its cell is the one that was written, edited already.
            cell = cell if instruction.again else edit(cell, i, here)
        elif edit.of == "query":
            query = edit(query, i, here)
        else:
            of_reads.append((edit, here))
    shared = operands.shared
    if cuts:
        memory, query, shared = hide(memory, query, i, shared, *zip(*cuts, strict=True))
    operands = operands._replace(cell=cell, query=query, shared=shared)
    return instruction._replace(memory=memory, operands=operands), of_reads
