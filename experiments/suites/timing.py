"""Timing compiled functions, and the limits of the machine that the times are compared with."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """One measured case.

    suite, case: what was run.
    tokens: how many a run handles.
    seconds: how long each run took, sorted.
    compile_seconds: how long tracing and compiling took.
    flops, bytes: the least that a run must compute and move, from the sizes of the model.
    """

    suite: str
    case: str
    tokens: int
    seconds: tuple[float, ...]
    compile_seconds: float
    flops: float
    bytes: float

    @property
    def median(self) -> float:
        """The seconds that a run takes."""
        return statistics.median(self.seconds)

    def memory_bound(self, limits: "Limits") -> bool:
        """Whether moving its bytes takes the machine longer than its arithmetic."""
        return self.bytes / limits.read > self.flops / limits.flops

    def share(self, limits: "Limits") -> float:
        """The least time that the machine could take, as a share of the time it took."""
        return max(self.flops / limits.flops, self.bytes / limits.read) / self.median


@dataclass(frozen=True)
class KernelFigure(Figure):
    """A figure of one kernel.

    kernel: the backend, or the rival.
    error: the largest difference from float64, as a share of the largest value; nan where a result
      is not finite, None where the results were not compared.
    """

    kernel: str
    error: float | None


@dataclass(frozen=True)
class Limits:
    """The speeds that the machine reaches in the simplest programs.

    read: bytes/s in a product of one row and a matrix, which reads each number once.
    flops: FLOP/s in a product of large matrices.
    """

    read: float
    flops: float

    def best(self, other: "Limits") -> "Limits":
        """The larger of each."""
        return Limits(max(self.read, other.read), max(self.flops, other.flops))

    def __str__(self):
        return f"reads {self.read / 1e9:.0f} GB/s, multiplies {self.flops / 1e12:.2g} TFLOP/s"


def compiled(function: Callable, *operands, donate=()):
    """Compiles a function for its operands; returns it with the seconds that took."""
    import jax

    begin = time.perf_counter()
    program = jax.jit(function, donate_argnums=donate).lower(*operands).compile()
    return program, time.perf_counter() - begin


def timed(call: Callable[[], object], repeats: int, budget=math.inf) -> tuple[float, ...]:
    """Returns the seconds that each call took, sorted, after a first call that does not count.

    There are `repeats` calls, or as many as begin within `budget` seconds.
    """
    import jax

    jax.block_until_ready(call())
    seconds = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < budget):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return tuple(sorted(seconds))


def measure_limits(dtype, repeats: int) -> Limits:
    """Measures this machine's limits for numbers of a dtype, each by the median of some runs.

    The rate of products is the best of several shapes, on a CPU by XLA or by NumPy. Memory is read
    in an array that no cache holds, by XLA or by the kernel that decoding takes.
    """
    import jax
    import jax.numpy as jnp

    from transformer.numerics.layouts import lay_out
    from transformer.numerics.numerics import FAST

    on_cpu = jax.default_backend() == "cpu"
    tall = jnp.ones((2**15 if on_cpu else 2**18, 4096), dtype)
    vector = jnp.ones(4096, dtype)

    def seconds(call):
        return statistics.median(timed(call, repeats))

    def product(function, a, b):
        program, _ = compiled(function, a, b)
        return seconds(lambda: program(a, b))

    times = [product(jnp.matmul, tall, vector)]
    if on_cpu:
        times.append(product(FAST.dot, vector, lay_out(tall.T, exact=False)))
    read = tall.nbytes / min(times)
    del tall
    side = 2048 if on_cpu else 8192
    rates = []
    for m, k, n in ((side, side, side), (side, side // 4, side), (side // 2, side // 2, 2 * side)):
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        times = [product(jnp.matmul, a, b)]
        if on_cpu and np.dtype(dtype) in (np.float32, np.float64):  # NumPy has no fast narrow ones
            x, y = np.asarray(a), np.asarray(b)
            times.append(seconds(lambda x=x, y=y: x @ y))
        rates.append(2 * m * k * n / min(times))
    return Limits(read, max(rates))
