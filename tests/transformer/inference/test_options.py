"""The options of `generate`, checked when they are made."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.inference.options import Options


@pytest.mark.parametrize("one", [3, np.int64(3), jnp.int32(3)])
def test_whole_numbers_of_any_library_are_taken(one):
    options = Options(max_new_tokens=one, seed=one, top_k=one)
    assert (options.max_new_tokens, options.seed) == (3, 3)
    assert options.sampling(9).top_k == 3


@pytest.mark.parametrize(
    "given, kind, message",
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0; it must be at least 1"),
        ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens=1.0 is of type float"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": "x"}, TypeError, "seed='x' is of type str; it must be a whole number"),
        ({"temperature": -1}, ValueError, "temperature=-1; it must be 0"),
        ({"temperature": 1e39}, ValueError, r"temperature=1e\+39; it must be .*at most 3.4e\+38"),
        ({"temperature": "hot"}, TypeError, "temperature='hot'; it must be a number"),
        ({"top_k": 0}, ValueError, "top_k=0"),
        ({"top_k": 1.5}, TypeError, "top_k=1.5"),
        ({"top_p": 1.5}, ValueError, "top_p=1.5"),
        ({"top_p": 0}, ValueError, "top_p=0"),
        ({"min_p": 2}, ValueError, "min_p=2"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(given, kind, message):
    with pytest.raises(kind, match=message):
        Options(**({"max_new_tokens": 4} | given))
