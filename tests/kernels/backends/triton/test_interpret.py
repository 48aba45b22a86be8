"""The interpreter itself: what is patched in Triton's own, and that the patches do not stay.

These are the tests of interpret and adapter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.operands import Shared, Where
from kernels.options import Options

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

import triton
import triton.language as tl

from kernels.backends.triton import attend, interpret
from kernels.backends.triton.adapter import call
from kernels.backends.triton.launches import INTERPRETER, Launch
from kernels.backends.triton.resources import compiled, lower
from kernels.tracing.target import target


@triton.jit
def _product_and_sum(a, b, product, total, only_half, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(product + at, tl.dot(x, y))
    tl.store(total + at, x + y)
    tl.store(only_half + at, x, mask=at < SIZE * SIZE // 2)


def run(a, b):
    size = a.shape[0]
    return call(
        _product_and_sum,
        a,
        b,
        outputs=[jax.ShapeDtypeStruct(a.shape, jnp.float32), *([a] * 2)],
        programs=1,
        launch=Launch(size, size, 4, 1),
        architecture=INTERPRETER,
        SIZE=size,
    )


@pytest.fixture
def operands(rng):
    return [jnp.asarray(rng.standard_normal((16, 16)), jnp.bfloat16) for _ in range(2)]


def test_bfloat16_is_a_number_and_rounds_to_nearest(operands):
    a, b = operands
    product, total, _ = jax.jit(run)(a, b)
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    # Products of bfloat16 are exact in float32; sixteen of them are added with its rounding.
    np.testing.assert_allclose(product, want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(a) + np.asarray(b))


def test_an_output_that_is_not_written_is_not_a_number(operands):
    a, b = operands
    _, _, half = jax.jit(run)(a, b)
    np.testing.assert_array_equal(np.asarray(half)[:8], np.asarray(a)[:8])
    assert np.isnan(np.asarray(half)[8:].astype(np.float32)).all()


def test_triton_compiles_after_interpreting(operands):
    """The language is as it was: the same functions, and the same kernel compiles for a GPU."""
    before = {name: getattr(tl, name) for name in ("load", "dot", "max", "arange")}
    a, b = operands
    jax.block_until_ready(jax.jit(run)(a, b))
    assert all(getattr(tl, name) is function for name, function in before.items())

    q, keys = jnp.zeros((1, 128, 1, 32)), jnp.zeros((1, 1, 128, 32))
    positions = jnp.arange(128)[None]
    options = Options(1.0)
    read = q, keys, keys, Where(positions), Shared()
    jax.block_until_ready(interpret.attend(*read, options=options))
    lowered = lower(lambda *x: attend(*x, options=options), *read, architecture=80)
    assert [kernel.name for kernel in compiled(lowered)] == ["forward_kernel"]


def test_kernels_traced_for_a_gpu_do_not_run_here():
    if jax.default_backend() != "cpu":
        pytest.skip("this process has a GPU")
    x = jnp.zeros((1, 1, 1, 32))
    with target("gpu", 90), pytest.raises(NotImplementedError, match="triton_interpret"):
        attend(x, x, x, Where(jnp.zeros((1, 1), jnp.int32)), Shared(), options=Options(1.0))
