"""A product in one order of sums, run by the interpreter: a row is as if it were the only one.

These are the tests of products and product_kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.backends.triton import interpret

# float32: sums of up to 150 products of about 1, each rounded by 6e-8. Products of bfloat16 are
# exact in float32.
TOLERANCE = 1e-4


@settings(max_examples=5)
@given(
    sizes=st.tuples(*[st.integers(1, 150)] * 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**32),
)
def test_a_row_is_as_if_it_were_the_only_one(sizes, dtype, seed):
    rng = np.random.default_rng(seed)
    rows, terms, columns = sizes
    x, w = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, terms), (terms, columns)))
    product = jax.jit(interpret.product)
    y = product(x, w)
    assert y.dtype == jnp.float32
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(y, want, rtol=0, atol=TOLERANCE)
    some = sorted(rng.integers(0, rows, 2).tolist())
    for part in (slice(some[0], some[0] + 1), slice(some[0], some[1] + 1)):
        np.testing.assert_array_equal(product(x[part], w), y[part])


def test_what_it_does_not_multiply():
    x = jnp.zeros((2, 3))
    with pytest.raises(NotImplementedError, match="multiplies one dtype; got float32 and bfloat16"):
        interpret.product(x, x.T.astype("bfloat16"))
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        interpret.product(jnp.zeros((2, 3), "float64"), jnp.zeros((3, 2), "float64"))
