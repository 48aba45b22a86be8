"""Suites of attention alone: each backend that runs here and its rivals, on the same inputs.

Each case is first held against float64, and then timed.
"""

import contextlib
import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites.timing import Figure, KernelFigure, compiled, timed
from kernels import attention as attend
from kernels.backends import reference
from kernels.blocks import Blocks
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.write_read import chunk, decode

BACKENDS = ("triton", "cudnn", "tokamax", "splash", "xla")
CHECKED = 64  # queries that float64 looks at: all keys of each, but no array of all by all


def attention(repeats: int):
    """Causal attention, forward, and forward with backward, at lengths from short to long."""
    if jax.default_backend() == "cpu":
        rows, heads, size, dtype, lengths, calls = 1, 4, 64, jnp.float32, (256, 1024), 1
    else:  # 16384 tokens of a model 2048 wide
        rows, heads, size, dtype, calls = 16384, 16, 128, jnp.bfloat16, 10
        lengths = (2048, 4096, 8192, 16384)
    for length in lengths:
        shape = (max(1, rows // length), length, heads, size)
        for backward in (False, True):
            yield from _attention(shape, dtype, backward, repeats, calls)


def _attention(shape, dtype, backward, repeats, calls):
    q, k, v, dz = _random((shape,) * 4, dtype)
    B, T, N, H = shape
    checked = np.sort(np.random.default_rng(0).choice(T, min(T, CHECKED), replace=False))
    want = _attention_in_float64(checked, q, k, v, dz, backward)
    # Cotangents of the checked queries only, of the first row: then float64 need not see the rest.
    only = jnp.zeros(dz.shape, dtype).at[0, checked].set(dz[0, checked])
    count = B * T
    figure = Figure(
        "attention",
        f"{T} x {B}, {'forward and backward' if backward else 'forward'}",
        calls * count,
        (),
        0.0,
        # Two products of T x T x H forward, five backward; half of them is masked.
        calls * 2 * B * N * T * T * H * (3.5 if backward else 1),
        calls * (11 if backward else 4) * q.nbytes,
    )
    rivals = {name: functools.partial(attend, backend=name) for name in BACKENDS}
    if T <= 4096:
        rivals["dense"] = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    for name, function in rivals.items():
        program = (
            _with_gradient(function) if backward else lambda q, k, v, _, f=function: (f(q, k, v),)
        )
        with _skipped(name):
            program, seconds = compiled(program, q, k, v, dz)
            z, *gradients = program(q, k, v, only)
            got = [z[0, checked], *(x[0] for x in gradients)]
            if backward:
                got[1] = got[1][checked]
            call = functools.partial(program, q, k, v, dz)
            yield _measured(figure, name, call, got, want, seconds, repeats, calls)
    call = _torch_attention(q, k, v, dz, backward)
    if call:
        yield _measured(figure, "torch sdpa", call, None, None, 0.0, repeats, calls)


def _with_gradient(function):
    def both(q, k, v, dz):
        z, pull = jax.vjp(function, q, k, v)
        return z, *pull(dz)

    return both


def _attention_in_float64(checked, q, k, v, dz, backward):
    """z of the checked queries of the first row; and the gradients that come of them alone."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x[:1].astype(jnp.float32)), jnp.float64)
        q, k, v, dz = map(wide, (q, k, v, dz))
        options = Options(q.shape[-1] ** -0.5)

        def read(q, k, v):
            keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
            where = Where(checked[None])
            return reference.attend(q, keys, values, where, Shared(), options=options)[0]

        results = _with_gradient(read)(q[:, checked], k, v, dz[:, checked])
        return [np.asarray(x[0]) for x in results[: 4 if backward else 1]]


def decode_attention(repeats: int):
    """The instruction for one token: a cell is written, all cells before it are read."""
    if jax.default_backend() == "cpu":
        cells, heads, kv_heads, size, dtype, batches, calls = (
            16384,
            12,
            12,
            64,
            jnp.float32,
            (1,),
            4,
        )
    else:
        cells, heads, kv_heads, size, dtype, calls = 32768, 32, 8, 128, jnp.bfloat16, 20
        batches = (1, 16)
    for rows in batches:
        yield from _decode(rows, cells, heads, kv_heads, size, dtype, repeats, calls)


def _decode(B, S, N, K, H, dtype, repeats, calls):
    shapes = (B, 1, N, H), (B, 1, K, H), (B, 1, K, H), (B, K, S, H), (B, K, S, H)
    q, k, v, keys, values = _random(shapes, dtype)
    i = jnp.full((1, 1), S - 1, jnp.int32)
    options = Options(H**-0.5)
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x[:1].astype(jnp.float32)), jnp.float64)
        written = [
            wide(block).at[:, :, -1].set(wide(new)[:, 0]) for block, new in ((keys, k), (values, v))
        ]
        z, _ = reference.attend(wide(q), *written, Where(i), Shared(), options=options)
        want = [np.asarray(z)]
    figure = Figure(
        "decode_attention",
        f"{S} cells x {B}",
        calls * B,
        (),
        0.0,
        calls * 4 * B * N * S * H,
        calls * (keys.nbytes + values.nbytes),
    )
    for name in BACKENDS:
        step = functools.partial(_decode_step, options, name)
        with _skipped(name):
            program, seconds = compiled(step, keys, values, i, k, v, q, donate=(0, 1))
            blocks = [jnp.copy(keys), jnp.copy(values)]

            def call(program=program, blocks=blocks):
                blocks[0], blocks[1], z = program(*blocks, i, k, v, q)
                return z

            yield _measured(figure, name, call, [call()[:1]], want, seconds, repeats, calls)
    call = _torch_decode(q, keys, values)
    if call:
        yield _measured(figure, "torch sdpa", call, None, None, 0.0, repeats, calls)


def _decode_step(options, backend, keys, values, i, k, v, q):
    blocks = Blocks((keys, values), batched=True)
    operands = blocks, i, (k, v), q, Shared()
    try:
        (keys, values), z = decode(*operands, options=options, backend=backend)
    except NotImplementedError:  # the backend has no such way
        (keys, values), z = chunk(
            blocks.take(), *operands[1:], options=options, packed=False, backend=backend
        )
    return keys, values, z


def _random(shapes, dtype):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@contextlib.contextmanager
def _skipped(kernel):
    """Goes on to the next kernel where one cannot do it, or fails on the device."""
    try:
        yield
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        _say(f"{kernel} is not run: {str(error).strip().splitlines()[0]}")


@functools.cache  # each reason once
def _say(text):
    print(text)


def _measured(figure, kernel, call, got, want, compile_seconds, repeats, calls):
    """Times `calls` calls in a row, as they come in a model; got and want are checked before."""

    def several():
        for _ in range(calls):
            result = call()
        if want is None and jax.default_backend() == "gpu":
            sys.modules["torch"].cuda.synchronize()
        return result

    error = None
    if want is not None:
        distance = lambda x, y: np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
        error = float(np.max([distance(x, y) for x, y in zip(got, want, strict=True)]))  # or nan
    return KernelFigure(
        **(
            vars(figure)
            | {
                "seconds": timed(several, repeats),
                "compile_seconds": compile_seconds,
            }
        ),
        kernel=kernel,
        error=error,
    )


def _torch_attention(q, k, v, dz, backward) -> Callable | None:
    """The same in torch's own attention, on the same numbers; None where torch is not there."""
    torch, tensors = _torch(*(x.swapaxes(1, 2) for x in (q, k, v, dz)))
    if torch is None:
        return None
    q, k, v, dz = tensors
    for x in (q, k, v):
        x.requires_grad_(backward)

    def call():
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            torch.autograd.grad(z, (q, k, v), dz)

    return call


def _torch_decode(q, keys, values) -> Callable | None:
    torch, tensors = _torch(q.swapaxes(1, 2), keys, values)
    if torch is None:
        return None

    def call():
        torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)

    return call


def _torch(*arrays):
    """torch, and the arrays as its tensors where JAX runs; (None, ()) without torch."""
    try:
        import torch
    except ImportError:
        return None, ()
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return None, ()
    convert = lambda x: torch.from_numpy(np.array(x, np.float32)).to(
        device="cuda" if on_gpu else "cpu", dtype=getattr(torch, x.dtype.name)
    )
    return torch, [convert(x) for x in arrays]
