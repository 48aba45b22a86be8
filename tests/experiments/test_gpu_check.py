"""The first minutes on a GPU, as people start them; what is checked is cut short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from experiments import gpu_check
from experiments.run import cli
from experiments.suites import gpu_checks

difference = float(sys.argv.pop())
gpu_checks.checks = lambda backend: [gpu_checks.Check(f"{backend}: z", difference, 1e-5)]
gpu_check._time = lambda suites, path, flag: print("timed", path.name, flag)
cli.start(gpu_check.main)
"""


def program(folder, *flags, difference):
    command = [sys.executable, "-c", PROGRAM, f"--out={folder}", *flags, str(difference)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("figures", [True, False])
def test_it_writes_what_it_found_under_the_name_of_the_device(tmp_path, figures):
    result = program(tmp_path, *[] if figures else ["--nofigures"], difference=1e-6)
    assert result.returncode == 0, result.stderr
    [file] = tmp_path.iterdir()
    report = json.loads(file.read_text())
    assert file.name == f"{report['device'].lower()}-checks.json"
    assert report["checks"] == [
        {"name": "triton: z", "difference": 1e-6, "allowed": 1e-5, "passed": True}
    ]
    assert "jax" in report["versions"]
    timed = [line for line in result.stdout.splitlines() if line.startswith("timed")]
    assert len(timed) == (4 if figures else 0)
    assert not figures or timed[-1].endswith(
        "-decode-buffers-loop --xla_gpu_enable_command_buffer=+WHILE"
    )


def test_a_check_that_fails_ends_it(tmp_path):
    result = program(tmp_path, difference=1e-3)
    assert result.returncode == 1 and "FAILED" in result.stdout and "timed" not in result.stdout
    assert result.stderr == "error: 1 of 1 checks failed.\n"
    [file] = tmp_path.iterdir()
    assert not json.loads(file.read_text())["checks"][0]["passed"]
