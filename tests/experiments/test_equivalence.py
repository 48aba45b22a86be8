"""The program that compares the ways to run a model, as people start it, on a small one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(*flags):
    command = [sys.executable, "-m", "experiments.equivalence", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_prints_a_row_for_each_way(saved):
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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--length=1", "--length=1"),
        ("--attention=fast", "attention backend 'fast' does not exist"),
        ("--workdir=nowhere", "nowhere"),
        ("--seed=-1", "seed"),
    ],
)
def test_wrong_use_is_one_line(flag, message):
    result = program(flag)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
