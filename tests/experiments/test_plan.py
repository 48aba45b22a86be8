"""The program that says what a step needs of devices that are not there, as people start it."""

import re
from functools import partial

import pytest

TINY = "--config=experiments/configs/tiny.py", "--config.data.batch_size=8"


@pytest.fixture
def program(run_program):
    return partial(run_program, "experiments.plan", *TINY)


def test_each_device_holds_its_part(program):
    E, F, KH, V, L, T = 256, 640, 32, 257, 2, 64
    sizes = f"--config.model.width={E}", f"--config.model.feed_forward_width={F}"
    sizes += (
        "--config.model.head_size=16",
        "--config.model.num_heads=16",
        f"--config.data.length={T}",
    )
    result = program(*sizes, "--mesh=data=2,fsdp=4")
    assert result.returncode == 0, result.stderr
    matrices = V * E + L * (2 * E * E + 2 * E * KH + 3 * E * F)
    norms = (2 * L + 1) * E
    shown = dict(re.findall(r"^ (\S.*?)  +([\d.,]+) MB", result.stdout, re.MULTILINE))
    # Matrices are split by fsdp, norms are whole; of Adam's two moments each device of data has
    # half; a cache has keys and values. All are float32, and shown to 0.01 MB.
    expected = {
        "parameters": matrices / 4 + norms,
        "gradients": matrices / 4 + norms,
        "optimizer's state": 2 * (matrices / 8 + norms / 2),
        "moving average": 0,
        f"besides, when sampling: a cache of {T} positions": 2 * L * KH * T,
    }
    for name, numbers in expected.items():
        assert abs(float(shown[name]) - 4 * numbers / 1e6) <= 0.006, name
    [gathers] = re.findall(r"x all-gather +([\d.]+) MB", result.stdout)
    assert float(gathers) > 4 * matrices / 1e6  # once at least, to its whole size


def test_what_cannot_be_planned_is_said(program):
    for mesh, said in (
        ("fsdp=-1", "give every size, as there are no devices to count"),
        ("model=2", "has an axis 'model'; the axes are data, fsdp, context, tensor"),
        ("data=3", "a batch of 8 rows cannot be split over data x fsdp = 3 devices"),
    ):
        result = program(f"--mesh={mesh}")
        assert (result.returncode, said in result.stderr) == (2, True), result.stderr
        assert "Traceback" not in result.stderr
