"""Queries of one sequence that share a key head: where they lie, and which cells they see."""

import contextlib
from typing import NamedTuple

import jax.numpy as jnp

from kernels.cpu.call import Buffer
from kernels.cpu.code import Code, Value
from kernels.operands import Where


def position_operands(where: Where, B: int, T: int):
    """The positions [B, T] of queries and where their documents begin [B, T], or [0, 0], int32."""
    rows = lambda x: jnp.broadcast_to(x, (B, T)).astype(jnp.int32)
    starts = where.q_starts
    return rows(where.q_positions), jnp.zeros((0, 0), jnp.int32) if starts is None else rows(starts)


class Queries(NamedTuple):
    """The queries of one sequence and key head, as code sees them.

    Attributes:
      code: where it is written.
      cells: of a block.
      window: as in `Options`, or a large number.
      row: how many queries of other sequences lie before these.
      heads: query heads in all.
      group: query heads of a key head.
      head: the first of this group.
      positions: [B, T], int32.
      starts: [B, T], int32, or empty.
    """

    code: Code
    cells: Value
    window: Value
    row: Value
    heads: Value
    group: Value
    head: Value
    positions: Buffer
    starts: Buffer

    def place(self, begin, n):
        """Where query head n of those from query `begin` on lies among all."""
        return (self.row + begin + n // self.group) * self.heads + self.head + n % self.group

    def position(self, t):
        """Of query t."""
        return self.code.small_integer(self.positions.address + (self.row + t) * 4)

    def seen(self, t, start):
        """Cells first <= p < stop that query t sees; none if they are not in this order."""
        code = self.code
        i = self.position(t)
        first = code.larger(code.larger(i - self.window + 1, start), 0)
        return first, code.smaller(i + 1, self.cells)

    def span(self, begin, end, start):
        """Cells first <= p < stop that hold all that queries begin <= t < end see."""
        code = self.code
        first, stop = code.variable(self.cells), code.variable(0)
        with code.loop(begin, end) as t:
            low, high = self.seen(t, start)
            with code.when(low < high):
                first.set(code.smaller(low, first.get()))
                stop.set(code.larger(high, stop.get()))
        return code.smaller(first.get(), stop.get()), stop.get()

    def readers(self, begin, end, start, cell, stop):
        """Queries first <= t < after that hold all of begin <= t < end that see some of the cells
        cell <= p < stop.
        """
        code = self.code
        first, after = code.variable(end), code.variable(begin)
        with code.loop(begin, end) as t:
            low, high = self.seen(t, start)
            with code.when(code.larger(low, cell) < code.smaller(high, stop)):
                first.set(code.smaller(first.get(), t))
                after.set(t + 1)
        return first.get(), after.get()

    @contextlib.contextmanager
    def documents(self, begin, end):
        """For each document of queries begin <= t < end: its queries, and its first position."""
        code = self.code
        at = code.variable(begin)
        with code.repeat(lambda: at.get() < end):
            first = at.get()
            start, after = self._start(first), code.variable(first + 1)
            with code.repeat(lambda: self._goes_on(after.get(), end, start)):
                after.set(after.get() + 1)
            yield first, after.get(), start
            at.set(after.get())

    def _start(self, t):
        """The first position that query t may read; it may lie before all cells."""
        code, start = self.code, self.code.variable(0)
        with code.when(self.starts.size(0) > 0):
            start.set(code.small_integer(self.starts.address + (self.row + t) * 4))
        return start.get()

    def _goes_on(self, t, end, start):
        """Whether query t is one, and of the document that begins at `start`."""
        inside = t < end
        return inside & self._start(self.code.select(inside, t, end - 1)).equals(start)
