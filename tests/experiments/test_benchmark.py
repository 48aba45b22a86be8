"""The program that measures speed, as people start it, on the smallest preset."""

import json
from functools import partial

import pytest


@pytest.fixture
def program(run_program):
    return partial(run_program, "experiments.benchmark")


def test_the_benchmark_reports_what_it_measured(run_source, tmp_path):
    """The limits are measured once, since each time takes seconds."""
    program = """
import functools
from experiments import benchmark
from experiments.run import cli
from experiments.suites import timing

timing.measure_limits = functools.cache(timing.measure_limits)
cli.start(benchmark.main)
"""
    json_file, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    result = run_source(
        program,
        "--suite=prefill,decode_attention",
        "--preset=tiny-gpt2",  # whose positions are fewer than the suites run
        "--numerics=fast,exact",
        "--repeats=2",
        f"--json={json_file}",
        f"--plot={plot}",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(json_file.read_text())
    assert report["attention"] == "auto"
    printed = result.stdout + result.stderr  # warnings, of products without a known order, say
    assert all(line in printed for line in report["notices"])
    assert any("'xla'" in line for line in report["notices"]) or report["device"] != "cpu"
    assert [row["suite"] for row in report["rows"]] == ["prefill", "prefill", "decode_attention"]
    assert report["rows"][1]["numerics"] == "exact" and report["rows"][1]["cost"] > 0
    for row in report["rows"]:
        assert row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]
        assert row["case"] in result.stdout
    # float32 sums of 16384 cells against float64.
    assert report["rows"][-1]["error"] < 1e-4
    assert "triton is not run: " in result.stdout or report["device"] != "cpu"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_cannot_run_costs_its_column_and_one_line(run_source, tmp_path):
    """The suites are replaced, since those that a peer runs take a large model."""
    program = """
from experiments import benchmark
from experiments.run import cli
from experiments.suites import timing

timing.measure_limits = lambda *_: timing.Limits(1e9, 1e12)
figure = lambda name: timing.Figure(name, "512", 8, (1.0,), 2.0, 1e9, 1e9)
benchmark._figures = lambda name, *_: [("fast", figure(name))]
cli.start(benchmark.main)
"""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho Traceback >&2\necho \"No module named 'torch'\" >&2\nexit 1\n"
    )
    python.chmod(0o755)
    for peer, reason in (
        (str(python), "No module named 'torch'; "),
        ("/nowhere/python", "[Errno 2] No such file or directory: '/nowhere/python'"),
    ):
        result = run_source(program, "--suite=prefill,decode", f"--peer={peer}")
        assert result.returncode == 0 and not result.stderr, result.stderr
        assert result.stdout.count("the peer is not run: ") == 1
        assert f"the peer is not run: {reason}" in result.stdout
        assert "decode 512 " in result.stdout and "ratio" not in result.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--suite=decode,speed", "--suite has no speed"),
        ("--preset=gpt5", "--preset=gpt5 does not exist"),
        ("--repeats=0", "repeats"),
        ("--preset=tiny --peer=python", "--peer runs GPT-2 124M, or a --model"),
        ("--weights=int8", "--dtype, --weights and --cache are for a --model"),
        ("--model=/nowhere", "/nowhere is neither a saved model nor a work directory"),
        ("--attention=fast", "attention backend 'fast' does not exist"),
        ("--suite=", "--suite is empty"),
        ("--json=/nowhere/figures.json", "/nowhere/figures.json"),
        ("--plot=figures.foo", "its name must end in .png"),
    ],
)
def test_wrong_use_is_one_line(program, flag, message):
    result = program(*flag.split())
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
