"""Tasks with answers that a program checks."""

import numpy as np
import pytest

from experiments.run.tasks import TASKS, Task, addition, reward, sorting


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


def test_the_reward_is_the_share_of_the_answer():
    task = Task("312>", "123")
    assert [reward(task, text) for text in ("123", "132", "12", "", "1234")] == [
        1,
        1 / 3,
        2 / 3,
        0,
        1,
    ]
