"""The program that shows how deep each way to run is, as people start it, on a few tokens."""

import json
from functools import partial

import pytest


@pytest.fixture
def program(run_program):
    return partial(run_program, "experiments.depth")


def test_it_computes_and_times_every_way(program, tmp_path):
    json_file, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    flags = f"--json={json_file}", f"--plot={plot}"
    result = program("--lengths=65,8", "--repeats=1", *flags)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = json.loads(json_file.read_text())["rows"]
    assert all(row["seconds"] > 0 and row["case"] in result.stdout for row in rows)
    depths = {}
    for row in rows:
        depths.setdefault(row["case"], {})[row["tokens"]] = row["depth"]
    layers = 2  # the delta rule has a short convolution in each, and pieces of 64 tokens
    chain = {8: 8 * layers, 65: 65 * layers}
    assert depths == {
        "attention, parallel": {8: layers, 65: layers},
        "attention, sequential": chain,
        "attention, no cache": chain,
        "feedback transformer": chain,
        "recurrent network": chain,
        "linear attention": {8: 3 * layers, 65: 7 * layers},
        "delta rule in pieces": {8: 2 * layers, 65: 3 * layers},
    }
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lengths=64,0", "--lengths=64,0; it takes numbers of tokens, at least 1"),
        ("--lengths=many", "--lengths=many; it takes numbers of tokens"),
        ("--plot=depth.txt", "its name ends in .png"),
        ("--json=/nowhere/depth.json", "/nowhere/depth.json"),
    ],
)
def test_wrong_use_is_one_line(program, flag, message):
    result = program(flag)
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
