"""Timing compiled functions, and the limits of the machine that times are held against."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured case.

    suite, case: what was run.
    tokens: per run; seconds: of each run, sorted; compile_seconds: of tracing and compiling.
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
        """Seconds of a run."""
        return statistics.median(self.seconds)

    def share(self, limits: "Limits") -> float:
        """The least time that the machine could take, as a share of the time it took."""
        return max(self.flops / limits.flops, self.bytes / limits.bandwidth) / self.median


@dataclass(frozen=True)
class Limits:
    """What the machine reaches on its simplest programs.

    bandwidth: bytes/s of a matrix-vector product, which reads each number once.
    flops: FLOP/s of a square matrix product.
    """

    bandwidth: float
    flops: float


def compiled(function: Callable, *operands, donate=()):
    """Compiles a function for its operands: (compiled, seconds it took)."""
    import jax

    begin = time.perf_counter()
    program = jax.jit(function, donate_argnums=donate).lower(*operands).compile()
    return program, time.perf_counter() - begin


def timed(call: Callable[[], object], repeats: int) -> tuple[float, ...]:
    """Seconds of each call, sorted, after one that does not count."""
    import jax

    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return tuple(sorted(seconds))


def measure_limits(dtype) -> Limits:
    """Measures this machine's limits for numbers of a dtype."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    side = 2048 if on_cpu else 8192
    square = jnp.ones((side, side), dtype)
    multiply, _ = compiled(jnp.matmul, square, square)
    flops = 2 * side**3 / timed(lambda: multiply(square, square), 5)[0]
    tall = jnp.ones((2**15 if on_cpu else 2**18, 4096), dtype)
    vector = jnp.ones(4096, dtype)
    read, _ = compiled(jnp.matmul, tall, vector)
    return Limits(tall.nbytes / timed(lambda: read(tall, vector), 5)[0], flops)
