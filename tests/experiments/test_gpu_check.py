"""The first minutes on a GPU, as people start them; what is checked is cut short."""

import json

import pytest

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


@pytest.fixture
def program(run_source, tmp_path):
    def program(*flags, difference):
        return run_source(PROGRAM, f"--out={tmp_path}", *flags, str(difference))

    return program


@pytest.mark.parametrize("figures", [True, False])
def test_it_writes_what_it_found_under_the_name_of_the_device(program, tmp_path, figures):
    result = program(*[] if figures else ["--nofigures"], difference=1e-6)
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


def test_a_check_that_fails_ends_it(program, tmp_path):
    result = program(difference=1e-3)
    assert result.returncode == 1 and "FAILED" in result.stdout and "timed" not in result.stdout
    assert result.stderr == "error: 1 of 1 checks failed.\n"
    [file] = tmp_path.iterdir()
    assert not json.loads(file.read_text())["checks"][0]["passed"]
