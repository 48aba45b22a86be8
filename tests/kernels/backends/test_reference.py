"""The oracle itself, against loops over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.backends import reference
from kernels.operands import Shared, Where
from kernels.options import Options


@pytest.mark.parametrize("window", [None, 5])
def test_equals_the_formula_for_each_query(rng, window):
    q, keys, values = (rng.normal(size=shape) for shape in ((12, 4, 8), (2, 12, 8), (2, 12, 6)))
    with jax.enable_x64(True):
        operands = (jnp.asarray(x)[None] for x in (q, keys, values))
        where, options = Where(np.arange(12)[None]), Options(0.3, window)
        z, lse = reference.attend(*operands, where, Shared(), options=options)
    for i, n in np.ndindex(12, 4):
        first = 0 if window is None else max(0, i - window + 1)
        weights = np.exp(keys[n // 2, first : i + 1] @ q[i, n] * 0.3)
        want = weights @ values[n // 2, first : i + 1] / weights.sum()
        # Sums of some dozen float64 products.
        np.testing.assert_allclose(z[0, i, n], want, atol=1e-13)
        np.testing.assert_allclose(lse[0, i, n], np.log(weights.sum()), atol=1e-13)


def test_a_sink_is_a_key_without_a_value(rng):
    """gpt-oss: the logit joins the denominator, and takes its weight nowhere."""
    with jax.enable_x64(True):
        q, keys, values = (jnp.asarray(rng.normal(size=(1, n, n, 8))) for n in (1, 1, 1))
        sinks = jnp.asarray(rng.normal(size=1))
        options, where = Options(1.0), Where(np.zeros((1, 1), np.int32))
        z, lse = reference.attend(q, keys, values, where, Shared(sinks), options=options)
        both = jnp.stack([(q * keys).sum(), sinks[0]])
        np.testing.assert_allclose(z, jax.nn.softmax(both)[0] * values, rtol=1e-12)
        np.testing.assert_allclose(lse[0, 0, 0], jax.nn.logsumexp(both), rtol=1e-12)
        nobody = Where(np.full((1, 1), -1, np.int32))
        z, lse = reference.attend(q, keys, values, nobody, Shared(sinks), options=options)
        assert (z == 0).all()
        assert (lse == -jnp.inf).all()
