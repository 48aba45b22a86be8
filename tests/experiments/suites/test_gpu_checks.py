"""The checks of a device, run with the backend of a CPU."""

import math

from experiments.suites.gpu_checks import Check, checks


def test_a_backend_that_is_right_passes():
    found = list(checks("xla", lengths=(1, 60), repeats=2))
    assert all(check.passed for check in found), [x for x in found if not x.passed]
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    assert "float32, T=60, packed: dk" in names
    assert "bfloat16, 64 steps of decode: blocks that moved" in names


def test_what_is_not_a_number_does_not_pass():
    assert Check("z", 1e-6, 1e-5).passed
    assert not Check("z", 1e-4, 1e-5).passed and not Check("z", math.nan, 1e-5).passed
