"""Tasks whose answers a program checks: a question, and the one right answer."""

from collections.abc import Callable
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


def reward(task: Task, text: str) -> float:
    """The share of the answer's characters that a text has in their places."""
    return sum(a == b for a, b in zip(task.answer, text, strict=False)) / len(task.answer)
