"""The program that compares the ways to run a model, as people start it, on a small one."""

import json
from functools import partial

import pytest


@pytest.fixture
def program(run_program):
    return partial(run_program, "experiments.equivalence")


def test_it_prints_a_row_for_each_way(program, saved):
    result = program(f"--workdir={saved}", "--length=20", "--attention=xla", "--json")
    assert result.returncode == 0, result.stderr
    rows = {row["way"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert list(rows) == [
        "parallel",
        "sequential",
        "chunks of 16",
        "chunks of 64",
        "batched",
        "larger capacity",
        "recompute",
    ]
    for way, row in rows.items():
        # The project's claim in float32.
        assert row["logit_difference"] <= 2e-5 and 0 < row["equal_bits"] <= 1
        assert way == "recompute" or row["gradient_difference"] <= 2e-5
        assert row["microseconds_per_token"] > 0 and row["growth"] > 0


@pytest.mark.thorough
def test_exact_numerics_give_equal_bits(program):
    """Compiled as people compile, with LLVM's optimisation, which other tests do without."""
    names = ["parallel", "sequential", "inside the training step"]
    result = program(
        "--preset=tiny",
        "--dtype=bfloat16",
        "--numerics=exact",
        "--length=20",
        f"--ways={','.join(names[1:])}",
        "--json",
        XLA_FLAGS="",
    )
    assert result.returncode == 0, result.stderr
    rows = list(map(json.loads, result.stdout.splitlines()))
    assert [(row["way"], row["equal_bits"]) for row in rows] == [(name, 1) for name in names]


def test_the_first_bits_that_part_are_named(program, saved):
    [fast] = program(f"--workdir={saved}", "--length=20", "--trace").stdout.splitlines()
    assert fast.startswith("bits part first in ") and "at token " in fast


@pytest.mark.thorough
def test_no_bits_part_in_exact_numerics(program, saved):
    exact = program(
        f"--workdir={saved}", "--length=20", "--trace", "--numerics=exact", XLA_FLAGS=""
    )
    assert exact.stdout == "all bits are equal, of every cell, query and read and of the logits\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--ways=backwards", "--ways=backwards does not exist"),
        ("--length=1", "--length=1"),
        ("--attention=fast", "attention backend 'fast' does not exist"),
        ("--workdir=nowhere", "nowhere"),
        ("--seed=-1", "seed"),
    ],
)
def test_wrong_use_is_one_line(program, flag, message):
    result = program(flag)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
