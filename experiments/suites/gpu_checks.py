"""What a backend of attention must show on a device, before it is worth timing.

Each check gives a largest difference, as a share of the largest value or of 1, and what is allowed.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention
from kernels.backends.choice import attend
from kernels.blocks import Blocks
from kernels.exact.products import product
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.write_read import decode

HEADS, KV_HEADS, SIZE = 8, 2, 64
# Rounding of operands, weights and results; some hundred terms a sum.
ALLOWED = {"float32": 1e-5, "bfloat16": 3e-2}


class Check(NamedTuple):
    """One check: what was looked at, the largest difference, and the most that is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; nan is not."""
        return self.difference <= self.allowed


def checks(backend: str, lengths=(1, 33, 65, 1056), repeats: int = 200) -> Iterator[Check]:
    """All checks of a backend, with float32 multiplied as float32."""
    with jax.default_matmul_precision("highest"):
        for dtype in ALLOWED:
            for length in lengths:
                for packed in (False, True)[: 1 if length == 1 else 2]:
                    yield from _against_the_formula(backend, dtype, length, packed)
            yield from _steps_against_one_read(backend, dtype)
            yield from _equal_bits(backend, dtype, lengths[-1])
        yield _repeats(backend, lengths[-1], repeats)


def _against_the_formula(backend, dtype, T, packed):
    """Forward and gradients against the dense formula in float64, with grouped heads."""
    *operands, dz = _normal(T, HEADS, KV_HEADS, KV_HEADS, HEADS)
    starts = np.arange(T) // 50 * 50 if packed else np.zeros(T, int)
    starts = starts[None].astype(np.int32)

    def results(backend, dtype, *arrays):
        read = partial(attention, q_starts=starts, backend=backend)
        z, pull = jax.vjp(read, *(x.astype(dtype) for x in arrays[:3]))
        return z, *pull(arrays[3].astype(dtype))

    got = jax.jit(partial(results, backend, dtype))(*operands, dz)
    with jax.enable_x64(True):
        rounded = [np.asarray(x.astype(dtype), np.float64) for x in (*operands, dz)]
        want = jax.jit(partial(results, "reference", np.float64))(*rounded)
    kind = "packed" if packed else "causal"
    for name, x, y in zip(("z", "dq", "dk", "dv"), got, want, strict=True):
        yield Check(f"{dtype}, T={T}, {kind}: {name}", _difference(x, y), ALLOWED[dtype])


def _steps_against_one_read(backend, dtype, steps=64):
    """Tokens written and read one by one, in place, against all of them at once."""
    q, k, v, _ = (x.astype(dtype) for x in _normal(steps, HEADS, KV_HEADS, KV_HEADS, HEADS))
    whole = jax.jit(partial(attention, backend=backend))(q, k, v)
    options = Options(SIZE**-0.5)

    def step(block, i, k, v, q):
        blocks, i = Blocks(block, batched=True), i[None, None]
        return decode(blocks, i, (k, v), q, Shared(), options=options, backend=backend)

    step, made = jax.jit(step, donate_argnums=0), []
    block = tuple(jnp.zeros((1, KV_HEADS, 512, SIZE), dtype) for _ in range(2))
    places = [x.unsafe_buffer_pointer() for x in block]
    for t in range(steps):
        cut = lambda x, t=t: x[:, t : t + 1]
        block, z = step(block, jnp.int32(t), cut(k), cut(v), cut(q))
        made.append(z)
    name = f"{dtype}, {steps} steps of decode"
    yield Check(f"{name}: z", _difference(jnp.concatenate(made, 1), whole), ALLOWED[dtype])
    moved = [x.unsafe_buffer_pointer() for x in block] != places
    yield Check(f"{name}: blocks that moved", float(moved), 0)


def _equal_bits(backend, dtype, T):
    """In exact numerics, rows of products and queries that run beside fewer others than T."""
    q, k, v, _ = (x.astype(dtype) for x in _normal(T, HEADS, KV_HEADS, KV_HEADS, HEADS))
    x = k.reshape(T, -1)
    w = x.T
    multiply = jax.jit(product)
    whole = multiply(x, w)
    for some in (slice(0, 1), slice(T // 2, T // 2 + 33)):
        few = multiply(x[some], w)
        yield _same_bits(f"{dtype}, {len(few)} of {T} rows of a product", few, whole[some])

    options, positions = Options(SIZE**-0.5, exact=True), jnp.arange(T, dtype=jnp.int32)[None]
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.jit
    def read(q, positions):
        where = Where(positions)
        return attend(backend, q, keys, values, where, Shared(), options=options)[0]

    whole = read(q, positions)
    for some in (slice(T - 1, T), slice(T // 2, T // 2 + 33)):
        few = read(q[:, some], positions[:, some])
        yield _same_bits(f"{dtype}, {few.shape[1]} of {T} queries", few, whole[:, some])


def _same_bits(name, some, whole):
    differ = float((some != whole).mean())
    return Check(f"exact, {name}: share that differs", differ, 0)


def _repeats(backend, T, repeats):
    """The share of repeated gradients whose bits differ from the first."""
    q, k, v, dz = (x.astype(jnp.bfloat16) for x in _normal(T, HEADS, KV_HEADS, KV_HEADS, HEADS))
    gradients = jax.jit(lambda *x: jax.vjp(partial(attention, backend=backend), *x)[1](dz))
    first = gradients(q, k, v)
    same = jax.jit(lambda *x: jnp.array([(a == b).all() for a, b in zip(*x, strict=True)]).all())
    different = sum(not same(first, gradients(q, k, v)) for _ in range(repeats))
    return Check(f"{repeats} gradients: share that differ", different / repeats, 0)


def _normal(T, *heads):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, T, n, SIZE)), jnp.float32) for n in heads]


def _difference(x, y):
    x, y = (np.asarray(value, np.float64) for value in (x, y))
    return float(np.abs(x - y).max() / max(1, np.abs(y).max()))
