"""Tasks with answers that a program checks."""

import numpy as np
import pytest

from experiments.run.tasks import TASKS, addition, marks, sorting


@pytest.mark.parametrize("size", [1, 4])
def test_answers_are_right_and_of_one_length(size, rng):
    for _ in range(20):
        question, answer = sorting(rng, size)
        assert question[-1] == ">" and list(answer) == sorted(question[:-1])
        question, answer = addition(rng, size)
        a, b = question[:-1].split("+")
        assert int(answer) == int(a) + int(b) and len(answer) == size + 1


def test_a_seed_gives_the_same_tasks():
    for task in TASKS.values():
        assert task(np.random.default_rng(3), 5) == task(np.random.default_rng(3), 5)


def test_marks_are_for_tokens_in_their_places():
    answer = [1, 2, 3]
    assert marks(answer, [1, 3, 3]) == [1, 0, 1]
    assert marks(answer, [1]) == [1, 0, 0]
    assert marks(answer, [1, 2, 3, 4]) == [1, 1, 1]
