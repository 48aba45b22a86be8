"""Functions of one number, against those of float64, and by how many stand beside it."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kernels.exact import functions

# A function of float64, the numbers it is tried on, and how far it may be off: relative to the
# result, or to 1 where results pass through 0. Cephes promises 1 to 2 units in the last place
# (6e-8), and for erfc 4e-6 (its doc/single.doc); a cosine of a large angle has the error of the
# angle's last part.
EPS = float(np.finfo(np.float32).eps)
CASES = {
    "exp": (np.exp, (-87, 88.7), EPS, False),
    "log": (np.log, (1e-30, 1e30), EPS, False),
    "tanh": (np.tanh, (-12, 12), 2 * EPS, False),
    "sin": (np.sin, (-1e5, 1e5), EPS, True),
    "cos": (np.cos, (-1e5, 1e5), EPS, True),
    "sigmoid": (special.expit, (-80, 80), 2 * EPS, False),
    "silu": (lambda x: x * special.expit(x), (-80, 80), 3 * EPS, False),
    "softplus": (lambda x: np.logaddexp(0, x), (-80, 80), 2 * EPS, False),
    "gelu_exact": (lambda x: 0.5 * x * special.erfc(-x / 2**0.5), (-8, 8), 2 * EPS, True),
    "gelu": (
        lambda x: 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        (-8, 8),
        4 * EPS,
        True,
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


def numbers(name, rng, count=3000):
    low, high = CASES[name][1]
    if low > 0:
        return np.exp(rng.uniform(math.log(low), math.log(high), count)).astype(np.float32)
    near = rng.standard_normal(count // 2)
    return np.concatenate([near, rng.uniform(low, high, count - len(near))]).astype(np.float32)


@EVERY
def test_it_is_the_function(name, rng):
    reference, _, most, absolute = CASES[name]
    x = numbers(name, rng)
    y, expected = jax.jit(getattr(functions, name))(x), reference(x.astype(np.float64))
    scale = np.maximum(1, np.abs(expected)) if absolute else np.abs(expected)
    assert (np.abs(y - expected) / scale).max() <= most


@EVERY
def test_a_number_has_the_same_bits_whatever_stands_beside_it(name, rng):
    f, x = jax.jit(getattr(functions, name)), numbers(name, rng, 60)
    together = np.asarray(f(x))
    for size in (1, 3, 5):
        apart = np.concatenate([f(x[n : n + size]) for n in range(0, 60, size)])
        np.testing.assert_array_equal(apart, together)


@EVERY
def test_special_numbers_are_as_the_library_has_them(name):
    library = {"gelu_exact": lambda x: jax.nn.gelu(x, approximate=False)}
    library |= {x: getattr(jax.nn, x) for x in ("gelu", "silu", "sigmoid", "softplus")}
    plain = library.get(name) or getattr(jnp, name)
    x = jnp.float32([0, -1, 100, -100, jnp.inf, -jnp.inf, jnp.nan])
    # Where sin, cos and log cancel, 1e-5 is 100 units in the last place of what enters.
    one, other = (jax.jit(f)(x) for f in (getattr(functions, name), plain))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_derivatives_are_those_of_the_library(name, dtype, rng):
    x = jnp.asarray(np.abs(rng.standard_normal(20)) + 0.1, dtype)
    y, slope = jax.jit(partial(jax.jvp, getattr(functions, name)))((x,), (jnp.ones_like(x),))
    assert y.dtype == slope.dtype == dtype
    step = 1e-6
    of = lambda at: CASES[name][0](np.asarray(x, np.float64) + at)
    # Of central differences in float64 6 digits remain; bfloat16 has 8 bits in each operation.
    tolerance = 1e-4 if dtype == "float32" else 0.05
    expected = (of(step) - of(-step)) / (2 * step)
    np.testing.assert_allclose(np.float32(slope), expected, rtol=tolerance, atol=tolerance)
