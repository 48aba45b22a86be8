"""Sums over rows on a CPU, in the tree of `kernels.exact.sums`, as one pass over memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp

from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.code import LANES
from kernels.cpu.functions import exp
from kernels.cpu.softmax import largest
from kernels.exact.sums import in_pairs, levels


def sums(x):
    """The sums of the rows of x [M, n], float32 -> [M]."""
    M, n = x.shape
    kernel = register(_kernel(n, False))
    return jax.ffi.ffi_call(kernel, jax.ShapeDtypeStruct((M,), jnp.float32))(x)


def sums_of_powers(x):
    """The largest number of each row of x [M, n], float32, and the sum of exp(x - largest).

    Returns:
      (largest [M], sums [M]). A row of -inf has 0 for its largest number.
    """
    M, n = x.shape
    result = jax.ShapeDtypeStruct((M,), jnp.float32)
    return jax.ffi.ffi_call(register(_kernel(n, True)), (result, result))(x)


@cache
def _kernel(n, powers):
    room = lambda frame: frame.code.constant(4 * (levels(n)[0][0] + LANES) * 2)
    name = f"unison_sums_of_{'powers' if powers else 'rows'}_{n}"
    return Kernel(name, lambda frame: frame.operand(0).size(0), partial(_row, n, powers), room)


def _row(n, powers, frame: Frame, row):
    """The sum of one row."""
    code = frame.code
    x = frame.operand(0).address + row * (4 * n)
    peak = None
    if powers:
        nothing = code.number(-float("inf"))
        peak = largest(code, lambda p: x + p * 4, 0, n, nothing)
        peak = code.select(peak.equals(nothing), code.number(0.0), peak)
        code.put(peak, frame.result(0).address + row * 4)
    here, there = x, frame.room
    for size, count in levels(n):
        _level(code, n, size, count, here, there, peak)
        n, here, there, peak = size, there, there + 4 * (size + LANES), None
    code.put(code.float(here), frame.result(1 if powers else 0).address + row * 4)


def _level(code, n, size, count, x, y, peak):
    """Adds up `count` slices of x [n], each of so many numbers, into y [size]."""
    last = n - (count - 1) * size  # numbers of the last slice; zeros follow

    def write(j, lanes, slices):
        load = code.float if lanes == 1 else code.vector
        terms = [load(x + (j + s * size) * 4) for s in range(slices)]
        if peak is not None:
            shift = peak if lanes == 1 else code.splat(peak)
            terms = [exp(code, term - shift) for term in terms]
        if slices < count:
            zero = code.number(0.0)
            terms.append(zero if lanes == 1 else code.splat(zero))
        code.put(in_pairs(terms), y + j * 4)

    for begin, end, slices in ((0, last, count), (last, size, count - 1)):
        several = end - (end - begin) % LANES
        with code.loop(begin, several, LANES) as j:
            write(j, LANES, slices)
        with code.loop(several, end) as j:
            write(j, 1, slices)
