"""Functions of one number, each in one order of operations.

A compiler writes such a function as a polynomial into the loop that needs it, and what becomes a
multiply-add there depends on the loop: of `exp` of 3 numbers at a time, one in ten differs in its
last bit from that of 640. So the polynomials are written here, and every product is rounded before
it feeds a sum. They are those of Cephes (Moshier, netlib.org/cephes, single precision).

Narrower types are computed in float32 and rounded once. Wider ones take the library's function, and
so do derivatives, which have no order to keep.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.exact.sums import rounded


def _define(formula: Callable, library: Callable) -> Callable:
    """A function of an array: `formula` of float32, with the derivative of the library's."""

    @jax.custom_jvp
    def function(x):
        if x.dtype.itemsize > 4:
            return library(x)
        return rounded(formula(rounded(x).astype(jnp.float32)).astype(x.dtype))

    @function.defjvp
    def _(primals, tangents):
        return function(*primals), jax.jvp(library, primals, tangents)[1]

    return function


def _polynomial(x, *coefficients):
    """The polynomial of x with these coefficients, that of the highest power first."""
    y = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = rounded(y * x) + c
    return y


def _power_of_two(n):
    """2^n in float32, for n an int32 from -126 to 127."""
    return jax.lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


# What `kernels.cpu` needs too. The first part of log(2) has 9 bits, so that n times it is exact.
LOG2_E = math.log2(math.e)
LOG_2 = 0.693359375, -2.12194440e-4
EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)


def _exp(x):
    # x = n log(2) + r
    n = jnp.round(rounded(jnp.clip(x, -88.0, 89.0) * LOG2_E))
    r = x - rounded(n * LOG_2[0]) - rounded(n * LOG_2[1])
    p = _polynomial(r, *EXP)
    y = rounded(p * rounded(r * r)) + r + 1
    n = n.astype(jnp.int32)
    half = n >> 1  # 2^128 is no float32
    y = y * _power_of_two(half) * _power_of_two(n - half)
    y = jnp.where(x < -87.3, 0, y)  # below, numbers are not normal, which processors may drop
    return jnp.where(x > 89, jnp.inf, y)


def _log(x):
    # x = 2^n (1 + r), with 1 + r between the square roots of 1/2 and of 2.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) - 0x3F3504F3  # that of sqrt(1/2)
    n = bits >> 23
    r = jax.lax.bitcast_convert_type(bits - (n << 23) + 0x3F3504F3, jnp.float32) - 1
    p = _polynomial(
        r,
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
    square = rounded(r * r)
    n = n.astype(jnp.float32)
    small = rounded(p * rounded(r * square)) + rounded(n * -2.12194440e-4) - rounded(0.5 * square)
    y = small + r + rounded(n * 0.693359375)
    y = jnp.where(x < jnp.finfo(x.dtype).tiny, jnp.where(x < 0, jnp.nan, -jnp.inf), y)
    return jnp.where(x < jnp.inf, y, x)  # inf and nan


def _log1p(x):
    """Of finite x. The error of 1 + x is made good: log(y) / (y - 1) changes slowly."""
    y = rounded(1 + x)
    return jnp.where(y == 1, x, x * (_log(y) / jnp.where(y == 1, 1, y - 1)))


def _tanh(x):
    size = jnp.abs(x)
    square = rounded(x * x)
    near = rounded(rounded(_polynomial(square, *TANH) * square) * x) + x
    far = 1 - 2 / (rounded(_exp(2 * size)) + 1)
    return jnp.where(size < 0.625, near, jnp.sign(x) * far)


def _erfc(x):
    square = rounded(x * x)
    p = _polynomial(
        square,
        7.853861353153693e-5,
        -8.010193625184903e-4,
        5.188327685732524e-3,
        -2.685381193529856e-2,
        1.128358514861418e-1,
        -3.761262582423300e-1,
        1.128379165726710,
    )
    near = 1 - rounded(x * p)
    size = jnp.abs(x)
    inverse = 1 / jnp.maximum(size, 1)
    inverse_square = rounded(inverse * inverse)
    p = jnp.where(
        size < 2,
        _polynomial(
            inverse_square,
            2.326819970068386e-2,
            -1.387039388740657e-1,
            3.687424674597105e-1,
            -5.824733027278666e-1,
            6.210004621745983e-1,
            -4.944515323274145e-1,
            3.404879937665872e-1,
            -2.741127028184656e-1,
            5.638259427386472e-1,
        ),
        _polynomial(
            inverse_square,
            -1.047766399936249e1,
            1.297719955372516e1,
            -7.495518717768503,
            2.921019019210786,
            -1.015265279202700,
            4.218463358204948e-1,
            -2.820767439740514e-1,
            5.641895067754075e-1,
        ),
    )
    far = rounded(rounded(_exp(-square)) * inverse * p)
    return jnp.where(size < 1, near, jnp.where(x < 0, 2 - far, far))


def _parts(x, bits, count):
    """x as a sum of numbers of so few bits each that an integer times them is not rounded."""
    parts = []
    for _ in range(count - 1):
        unit = 2.0 ** (math.floor(math.log2(x)) + 1 - bits)
        parts.append(math.floor(x / unit) * unit)
        x -= parts[-1]
    return [*parts, x]


def _turned(x, quarters):
    """The sine of x plus so many quarters of a turn."""
    # x = n pi / 2 + r. With 7 bits, n times a part is exact up to 2^17.
    n = jnp.round(rounded(x * (2 / math.pi)))
    r = x
    for part in _parts(math.pi / 2, 7, 4):
        r = r - rounded(n * np.float32(part))
    square = rounded(r * r)
    p = _polynomial(square, -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
    sine = rounded(rounded(p * square) * r) + r
    p = _polynomial(
        square, 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2, -0.5, 1.0
    )
    n = n.astype(jnp.int32) + quarters
    y = jnp.where(n & 1 == 0, sine, p)
    return jnp.where(n & 2 == 0, y, -y)


def _sigmoid(x):
    return 1 / (1 + rounded(_exp(-x)))


def _softplus(x):
    return jnp.maximum(x, 0) + rounded(_log1p(rounded(_exp(-jnp.abs(x)))))


def _gelu(x):
    inner = x + rounded(0.044715 * (x * x * x))
    return 0.5 * x * (1 + rounded(_tanh(rounded(math.sqrt(2 / math.pi) * inner))))


exp = _define(_exp, jnp.exp)
log = _define(_log, jnp.log)
tanh = _define(_tanh, jnp.tanh)
sin = _define(lambda x: _turned(x, 0), jnp.sin)
cos = _define(lambda x: _turned(x, 1), jnp.cos)
sigmoid = _define(_sigmoid, jax.nn.sigmoid)
silu = _define(lambda x: x * _sigmoid(x), jax.nn.silu)
softplus = _define(_softplus, jax.nn.softplus)
gelu = _define(_gelu, jax.nn.gelu)  # in its tanh form
gelu_exact = _define(
    lambda x: 0.5 * x * rounded(_erfc(rounded(-math.sqrt(0.5) * x))),
    lambda x: jax.nn.gelu(x, approximate=False),
)
