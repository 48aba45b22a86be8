"""The programs that measure, as people start them, on the smallest preset."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_benchmark_reports_what_it_measured(tmp_path):
    json_file, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    result = program(
        "benchmark",
        "--suite=prefill,generate,decode_attention",
        "--preset=tiny",
        "--repeats=2",
        f"--json={json_file}",
        f"--plot={plot}",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(json_file.read_text())
    assert report["attention"] == "auto"
    assert all(line in result.stdout.splitlines() for line in report["attention_chosen"])
    assert any("'xla'" in line for line in report["attention_chosen"]) or report["device"] != "cpu"
    assert [row["suite"] for row in report["rows"]] == [
        "prefill",
        *("generate",) * 2,
        "decode_attention",
    ]
    for row in report["rows"]:
        assert row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]
        assert row["case"] in result.stdout
    # float32 sums of 16384 cells against float64.
    assert report["rows"][-1]["error"] < 1e-4
    assert "triton is not run: " in result.stdout or report["device"] != "cpu"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_equivalence_prints_a_row_for_each_way():
    result = program("equivalence", "--preset=tiny", "--length=20", "--attention=xla", "--json")
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
    "name, flag, message",
    [
        ("benchmark", "--suite=decode,speed", "--suite has no speed"),
        ("benchmark", "--preset=gpt5", "--preset=gpt5 does not exist"),
        ("benchmark", "--repeats=0", "repeats"),
        ("equivalence", "--preset=gpt5", "--preset=gpt5 does not exist"),
        ("equivalence", "--length=1", "--length=1"),
        ("equivalence", "--attention=fast", "attention backend 'fast' does not exist"),
        ("benchmark", "--attention=fast", "attention backend 'fast' does not exist"),
        ("equivalence", "--workdir=nowhere", "nowhere"),
        ("equivalence", "--seed=-1", "seed"),
        ("benchmark", "--suite=", "--suite is empty"),
        ("benchmark", "--json=/nowhere/figures.json", "/nowhere/figures.json"),
        ("benchmark", "--plot=figures.foo", "its name ends in .png"),
    ],
)
def test_wrong_use_is_one_line(name, flag, message):
    result = program(name, flag)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
