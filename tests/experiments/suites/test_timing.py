"""Timing, and the limits that times are compared with."""

import time

import jax.numpy as jnp
import pytest

from experiments.suites.timing import Figure, Limits, compiled, timed


def test_the_first_call_does_not_count():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.1 if len(calls) == 1 else 0.001)

    seconds = timed(call, 5)
    assert len(calls) == 6 and len(seconds) == 5
    assert list(seconds) == sorted(seconds) and seconds[-1] < 0.1
    assert len(timed(call, 1000, budget=0.01)) < 1000


def test_a_function_is_compiled_for_its_operands():
    program, seconds = compiled(lambda x, y: x + y, jnp.ones(3), jnp.ones(3))
    assert program(jnp.ones(3), jnp.ones(3)).tolist() == [2, 2, 2] and seconds > 0


def test_a_figure_is_held_against_what_bounds_it():
    limits = Limits(read=2e9, flops=1e12)
    slow_memory = Figure("s", "c", 1, (1.0, 2.0, 4.0), 0.0, flops=1e12, bytes=3e9)
    assert slow_memory.memory_bound(limits) and slow_memory.share(limits) == pytest.approx(0.75)
    slow_sums = Figure("s", "c", 1, (1.0, 2.0, 4.0), 0.0, flops=1e12, bytes=1e9)
    assert not slow_sums.memory_bound(limits) and slow_sums.share(limits) == pytest.approx(0.5)
    assert "reads 2 GB/s, multiplies 1 TFLOP/s" in str(limits)
    better = limits.best(Limits(read=1e9, flops=3e12))
    assert better == Limits(read=2e9, flops=3e12)
