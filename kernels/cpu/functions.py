"""Functions of one number on a CPU, with the roundings of `kernels.exact.functions`."""

from kernels.cpu.code import Code, Value
from kernels.exact import functions


def exp(code: Code, x: Value) -> Value:
    """`kernels.exact.functions.exp` of numbers up to 88."""
    n = code.nearest(code.larger(x, -88.0) * functions.LOG2_E)
    r = x - n * functions.LOG_2[0] - n * functions.LOG_2[1]
    y = _polynomial(r, *functions.EXP) * (r * r) + r + 1.0
    n = code.whole(n)
    half = n >> 1
    y = y * code.float_of_bits((half + 127) << 23) * code.float_of_bits((n - half + 127) << 23)
    y = code.select(x < -87.3, code.constant(0.0, y.value.type), y)
    return code.select(x.equals(x), y, x)  # nan


def tanh(code: Code, x: Value) -> Value:
    """`kernels.exact.functions.tanh`."""
    one, two = (code.constant(n, x.value.type) for n in (1.0, 2.0))
    size, square = code.larger(x, x * -1.0), x * x
    near = _polynomial(square, *functions.TANH) * square * x + x
    far = one - two / (exp(code, code.smaller(size * 2.0, 88.0)) + 1.0)  # 1 from there on
    return code.select(size >= 0.625, code.select(x < 0.0, far * -1.0, far), near)


def _polynomial(x, *coefficients):
    """The polynomial of x with these coefficients, that of the highest power first."""
    first, second, *others = coefficients
    y = x * first + second
    for c in others:
        y = y * x + c
    return y
