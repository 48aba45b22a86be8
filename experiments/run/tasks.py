"""Tasks whose answers a program checks: a question, and the one right answer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    """A question, and its answer."""

    question: str
    answer: str


def sorting(rng: np.random.Generator, size: int) -> Task:
    """So many digits, to be put in order."""
    digits = [str(digit) for digit in rng.integers(0, 10, size)]
    return Task("".join(digits) + ">", "".join(sorted(digits)))


def addition(rng: np.random.Generator, size: int) -> Task:
    """Two numbers of so many digits, to be added; the sum has a digit more."""
    a, b = rng.integers(0, 10**size, 2)
    return Task(f"{a:0{size}}+{b:0{size}}=", f"{a + b:0{size + 1}}")


TASKS: dict[str, Callable[[np.random.Generator, int], Task]] = {
    "sorting": sorting,
    "addition": addition,
}


def marks(answer: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Of each token of an answer 1 if it was given in its place, else 0."""
    given = [*tokens[: len(answer)], *[None] * (len(answer) - len(tokens))]
    return [float(a == b) for a, b in zip(answer, given, strict=True)]
