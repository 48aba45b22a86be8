"""The static choices: what they accept, and that JAX takes them as one."""

import jax
import numpy as np
import pytest

from kernels.options import Options


def test_numbers_of_numpy_become_those_of_python():
    options = Options(np.float32(0.5), np.int64(3), np.float64(2))
    assert options == Options(0.5, 3, 2.0)
    kinds = [type(x) for x in (options.scale, options.window, options.soft_cap)]
    assert kinds == [float, int, float]
    assert hash(options) == hash(Options(0.5, 3, 2.0))


def test_it_is_static_inside_a_pytree():
    leaves, tree = jax.tree.flatten({"options": Options(0.5), "x": 1})
    assert leaves == [1]
    assert jax.tree.unflatten(tree, leaves)["options"] == Options(0.5)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"scale": 0}, ValueError, "scale=0; it must be a number above 0"),
        ({"scale": np.nan}, ValueError, "scale=nan; it must be a number above 0"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap=-1.0; it must be a number above 0"),
        ({"window": 0}, ValueError, "window=0; it must be at least 1"),
        ({"window": 2.0}, TypeError, "window=2.0; it must be an integer, or None"),
    ],
)
def test_what_is_out_of_range_is_refused(choices, error, message):
    with pytest.raises(error, match=message):
        Options(**({"scale": 1.0} | choices))
