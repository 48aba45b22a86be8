"""The rules that a program keeps, and the error of one that breaks them while it is traced."""

from enum import StrEnum


class Rule(StrEnum):
    """What a function of one token must keep so that all tokens of a sequence can run at once."""

    # Each block is written by exactly one write_read, in order.
    ONCE = "written once"
    # The arrays of a block go nowhere but through write_read and read, and into the cache.
    PRIVATE = "blocks are private"
    # What is written is the cell of the token's own position, and what is read is up to it.
    OWN = "own cell"
    # A block is read again only after this token has written it.
    WRITTEN = "read after write"
    # Nothing but the cache connects one token with the next.
    STATE = "no other state"
    # No operation mixes what different tokens of a sequence compute.
    APART = "tokens apart"
    # Nothing hides from the analysis what a rule is about.
    PROVABLE = "provable"
    # The program can be traced for one token, and returns (cache, logits [V]).
    RUNS = "runs"


class ProgramError(Exception):
    """A program that breaks the rules: of the cache, or of its only instruction.

    Attributes:
      rule: the rule that it breaks.
      block: the number of the block that it is about; None: of none, or of all.
    """

    def __init__(self, message: str, rule: Rule = Rule.ONCE, block: int | None = None):
        super().__init__(message)
        self.rule, self.block = rule, block
