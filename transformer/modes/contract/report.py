"""What a check found: violations, and a table of them."""

import os
import textwrap
from dataclasses import dataclass, field

WIDTH = 80  # columns of the printed table


@dataclass(frozen=True)
class Violation:
    """One way in which a program breaks the contract.

    Attributes:
      rule: the rule or the law that it breaks, in a few words.
      block: the number of the block that it is about; None: of none, or not known.
      operation: the operation of JAX that breaks it, or what was run.
      where: the line of the user's code, as "file:line".
      why: what is wrong, in sentences.
    """

    rule: str
    block: int | None
    operation: str
    where: str
    why: str


@dataclass(frozen=True)
class Report:
    """What `check_contract` found. Its text is a table.

    Attributes:
      violations: in the order of the program; empty where it is lawful.
      notes: what is lawful and worth knowing, and what was not checked.
    """

    violations: list[Violation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lawful(self) -> bool:
        """Whether no rule is broken."""
        return not self.violations

    def __str__(self):
        lines = ["lawful: every rule of the contract holds."]
        if self.violations:
            plural = "s" if len(self.violations) > 1 else ""
            lines = [f"unlawful: {len(self.violations)} violation{plural} of the contract.", ""]
            lines += self._table()
        for note in self.notes:
            lines += ["", *textwrap.wrap(f"note: {note}", WIDTH)]
        return "\n".join(lines)

    def _table(self):
        rows = [
            (v.rule, "-" if v.block is None else str(v.block), v.operation) for v in self.violations
        ]
        headings = ("rule", "block", "operation")
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        left = WIDTH - sum(widths) - 2 * len(widths)
        line = lambda cells, where: (
            "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + "  " + where
        )
        yield line(headings, "where")
        yield "-" * WIDTH
        for row, violation in zip(rows, self.violations, strict=True):
            yield line(row, _shortened(violation.where, left))
            yield from textwrap.wrap(
                violation.why, WIDTH, initial_indent="    ", subsequent_indent="    "
            )


def _shortened(where, width):
    """A place in at most `width` columns: relative to the working directory, or its end."""
    where = where.removeprefix(os.getcwd() + os.sep)
    return where if len(where) <= width else "..." + where[3 - width :]
