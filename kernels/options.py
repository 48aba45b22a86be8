"""The static choices of one attention, shared by every backend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How scores are made and which keys are seen; hashable, so it can be a static argument.

    scale: factor on q.k, usually 1/sqrt(H).
    window: a query at position i sees the positions i - window + 1 .. i; None: all up to i.
    soft_cap: cap * tanh(score / cap) on the scaled scores (Gemma 2, arXiv:2408.00118); None: off.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
