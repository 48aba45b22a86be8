"""Functions of one number whose bits do not depend on the loop that they are computed in.

A compiler writes out a polynomial of multiplications and sums for `exp`, and makes one instruction
of two, which rounds once, or does not, as the loop happens to be vectorised: of a short loop every
tenth number had another last bit. Here each product is rounded before it feeds a sum.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.exact.sums import rounded

_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32([1.44269504, 0.693359375, -2.12194440e-4])
_LEAST, _MOST = np.float32([-87.336544, 88.722839])  # the logs of all normal numbers lie between
# (e^r - 1 - r) / r^2 for |r| up to log(2) / 2, from r^5 down (S. Moshier's Cephes library, expf.c).
_COEFFICIENTS = np.float32(
    [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 0.16666665459, 0.5]
)


@jax.custom_jvp
def exp(x):
    """e to the power of x, within 2 units in the last place; 0 where that is no normal number.

    Types other than float32 are left to the compiler.
    """
    if x.dtype != jnp.float32:
        return rounded(jnp.exp(rounded(x)))
    x = rounded(x)
    bounded = jnp.clip(x, _LEAST, _MOST)
    n = jnp.round(rounded(bounded * _LOG2_E))
    # n times the upper part, of 9 bits, is exact, so that it does not matter how it is subtracted.
    r = bounded - n * _LN2_HIGH - rounded(n * _LN2_LOW)
    power = _COEFFICIENTS[0]
    for coefficient in _COEFFICIENTS[1:]:
        power = rounded(power * r) + coefficient
    power = rounded(power * rounded(r * r)) + r + 1
    # As two factors, since 2^128 is no number; products with powers of two are exact.
    n = n.astype(jnp.int32)
    power = power * _power_of_two(n >> 1) * _power_of_two(n - (n >> 1))
    return rounded(jnp.where(x < _LEAST, 0, jnp.where(x > _MOST, jnp.inf, power)))


def _power_of_two(n):
    return jax.lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


@exp.defjvp
def _exp_jvp(primals, tangents):
    y = exp(*primals)
    return y, tangents[0] * y
