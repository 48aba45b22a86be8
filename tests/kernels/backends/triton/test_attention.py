"""The Triton backend under JAX's transformations, run by the interpreter: the tests of attention.

What its kernels compute is tested in tests/kernels/test_attention.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.backends import reference
from kernels.operands import Shared, Where
from kernels.options import Options

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
pytest.importorskip("jax_triton", reason="jax-triton does not import", exc_type=ImportError)

from kernels.backends.triton import interpret

T, N, K, H = 40, 4, 2, 32
OPTIONS = Options(H**-0.5)
POSITIONS = jnp.arange(T)[None]
SINKS = jnp.linspace(-1, 1, N)
# Both sides are float32 sums of the same numbers in another order; the terms may be as large as the
# largest result.
ROUNDING = 1e-5


def operands(rng, *leading):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal((*leading, *shape)), jnp.float32)

    return normal(T, N, H), normal(K, T, H), normal(K, T, H)


def loss(attend):
    def of(q, keys, values, sinks=SINKS):
        z, lse = attend(q, keys, values, Where(POSITIONS), Shared(sinks), options=OPTIONS)
        return (z**2).sum() + lse.sum()

    return of


def same(transform, *arrays):
    """`transform(attend's loss)` is the same for the Triton source and for the formula."""
    got, want = (
        transform(loss(attend))(*arrays) for attend in (interpret.attend, reference.attend)
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=ROUNDING * max(1, np.abs(y).max()))


def test_vmap_of_grad(rng):
    same(lambda f: jax.jit(jax.vmap(jax.grad(f, (0, 1, 2)))), *operands(rng, 3, 2))


def test_grad_of_vmap_with_an_operand_that_is_not_mapped(rng):
    def transform(f):
        batched = jax.vmap(jax.vmap(f, (0, None, None)), (1, None, None))
        return jax.jit(jax.grad(lambda *x: batched(*x).sum(), (0, 1, 2)))

    q, _, _ = operands(rng, 2, 2, 1)
    _, keys, values = operands(rng, 1)
    same(transform, q, keys, values)


def test_vmap_over_sinks(rng):
    def transform(f):
        return jax.jit(jax.vmap(jax.grad(f, 3), (None, None, None, 0)))

    same(transform, *operands(rng, 1), jnp.stack([SINKS, -SINKS]))


def test_scan_and_remat(rng):
    """Three layers in a scan, each recomputed in the backward pass."""

    def transform(f):
        def layers(q, keys, values):
            @jax.checkpoint
            def layer(total, x):
                return total + f(q * x, keys, values), None

            return jax.lax.scan(layer, 0.0, jnp.array([0.5, 1.0, 2.0]))[0]

        return jax.jit(jax.grad(layers, (0, 1, 2)))

    same(transform, *operands(rng, 1))


def test_float16_holds_gradients_as_large_as_it_can(rng):
    """What is rounded to float16 on the way is no larger than the gradients themselves."""
    # Large values, so that the gradients of the scores are what comes near to the end.
    sizes = (1, 1, 20)
    operands = [jnp.asarray(n * rng.standard_normal((1, 64, 2, 128)), "float16") for n in sizes]
    dz = rng.standard_normal((1, 64, 2, 128)).astype(np.float32)

    def gradients(dz, backend, dtype):
        arrays = (x.astype(dtype) for x in operands)
        return jax.vjp(lambda *x: attention(*x, backend=backend), *arrays)[1](dz.astype(dtype))

    largest = max(jnp.abs(x).max() for x in gradients(dz, "xla", "float32"))
    dz = dz * (30000 / largest)  # a loss scaled up, as half precision is trained
    want = gradients(dz, "xla", "float32")
    for x, y in zip(gradients(dz, "triton_interpret", "float16"), want, strict=True):
        # Some ten roundings to 11 bits, of terms as large as the largest result.
        np.testing.assert_allclose(x.astype(np.float32), y, atol=5e-3 * 30000)
