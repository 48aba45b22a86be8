"""Runs the kernels' Triton source on the CPU, inside jit: the backend `triton_interpret`.

jax-triton's primitive gets a lowering for the CPU: a callback that runs the kernel's Python source
in Triton's own interpreter, on NumPy buffers. It is for tests: thousands of times slower than a
GPU, and exact about masks, indices and the order of operations.

While a kernel runs, `triton.language` stands patched, so nothing can be compiled for a GPU at that
moment in another thread.
"""

import contextlib
import functools
import sys
import threading
import types

import jax
import jax_triton.triton_lib as jt
import ml_dtypes
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as ti
from jax._src.custom_partitioning import _custom_partitioning_lowering_rule
from jax.experimental.custom_partitioning import custom_partitioning_p
from jax.interpreters import mlir
from triton.runtime.jit import JITFunction

from kernels.backends.triton import attention, decoding, products, writing
from kernels.backends.triton.launches import INTERPRETER
from kernels.tracing.target import platform


def _interpreted_op(op):
    """An op of `kernels.backends.triton` whose kernels are run by the interpreter."""

    @functools.wraps(op)
    def run(*operands, **options):
        if platform() != "cpu":
            raise NotImplementedError(
                f"it interprets kernels on a CPU, and this is a {platform()}; on a CUDA GPU use "
                "the backend triton."
            )
        return op(*operands, **options, on=INTERPRETER)

    return run


attend = _interpreted_op(attention.attend)
decode = _interpreted_op(decoding.decode)
read = _interpreted_op(decoding.read)
write = _interpreted_op(writing.write)
product = _interpreted_op(products.product)

_LOCK = threading.Lock()  # the interpreter keeps the current program in a global


class _Builder(ti.InterpreterBuilder):
    """The stock builder keeps bfloat16 as raw bits: products are wrong, and rounding truncates.

    Here a bfloat16 tile is a NumPy array of `ml_dtypes.bfloat16`, which knows its own arithmetic.
    """

    def __init__(self):
        super().__init__()
        # Checking every integer operation for overflow would take a fifth of the time.
        self.options = ti.InterpreterOptions(sanitize_overflow=False)

    def cast_impl(self, src, dst_type):
        return ti.TensorHandle(src.data.astype(ti._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return self.cast_impl(src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # NumPy's own loop: a row's bits do not depend on its place in the tile, as on a GPU, and
        # no threads of a BLAS compete with those of XLA.
        a, b = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        product = np.einsum("ik,kj->ij", a, b)
        return ti.TensorHandle(product + d.data, d.dtype.scalar)


_stock_np_dtype = ti._get_np_dtype


def _np_dtype(dtype):
    is_pointer = isinstance(dtype, tl.pointer_type)
    is_bfloat16 = not is_pointer and dtype.scalar == tl.bfloat16
    return np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else _stock_np_dtype(dtype)


@functools.cache
def _interpreted(function):
    """The Python function under `triton.jit` as the interpreter runs it, all that it calls too."""
    scope = dict(function.__globals__)
    for name in function.__code__.co_names:
        if isinstance(scope.get(name), JITFunction):
            scope[name] = _interpreted(scope[name].fn)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    return ti.FunctionRewriter(copy).rewrite_ast()


@contextlib.contextmanager
def _interpreted_language():
    """`triton.language` as the interpreter needs it, and as it was afterwards."""
    scope = ti._LangPatchScope()
    builder = _Builder()
    scope.set_attr(ti, "_get_np_dtype", _np_dtype)
    scope.set_attr(ti, "interpreter_builder", builder)
    scope.set_attr(ti, "interpreter_semantic", ti.TritonSemantic(builder))
    library = [m for name, m in sys.modules.items() if name.startswith("triton.language")]
    try:
        for owner in [*library, tl.tensor]:
            for name, member in list(vars(owner).items()):
                if isinstance(member, JITFunction):
                    scope.set_attr(owner, name, _interpreted(member.fn))
        yield builder
    finally:
        scope.restore()


def _run(function, grid, arguments):
    """Runs every program of a grid, one after the other, on NumPy buffers."""
    with _LOCK, np.errstate(all="ignore"), _interpreted_language() as builder:
        names = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        language = ti._patch_lang(names)
        # Triton 3.6 takes a scalar to be 0-dimensional, which NumPy 2.4 insists on.
        language.set_attr(tl.tensor, "__index__", lambda x: int(x.handle.data.squeeze()))
        try:
            body = _interpreted(function.fn)
            builder.set_grid_dim(*grid)
            for program in np.ndindex(*grid):
                builder.set_grid_idx(*program)
                body(**arguments)
        finally:
            language.restore()


def _pointer(array, aval):
    dtype = tl.str_to_ty(jt.get_triton_type(aval), None)
    return tl.tensor(ti.TensorHandle(np.array([array.ctypes.data], np.uint64), dtype), dtype)


def _poison(aval):
    """Not a number, so that a kernel that forgets to write shows."""
    floating = np.issubdtype(aval.dtype, np.floating) or aval.dtype == ml_dtypes.bfloat16
    return np.full(aval.shape, np.nan if floating else np.iinfo(aval.dtype).min, aval.dtype)


def _lower(ctx, *operands, fn, grid, scalar_args, input_output_aliases, **parameters):
    if parameters["compute_capability"] != INTERPRETER:
        raise NotImplementedError(
            "triton kernels traced for a GPU cannot run on the CPU; use the backend "
            "triton_interpret."
        )
    constants = {name: parameters[name] for name in fn.arg_names if name in parameters}

    def callback(*arrays):
        arrays = [np.ascontiguousarray(x) for x in arrays]
        outputs = [_poison(aval) for aval in ctx.avals_out]
        for operand, output in input_output_aliases:
            outputs[output] = arrays[operand].copy()
        arguments = [_pointer(*pair) for pair in zip(arrays, ctx.avals_in, strict=True)]
        for index, _, value in scalar_args:
            arguments.insert(index, ti._implicit_cvt(value))
        arguments += [_pointer(*pair) for pair in zip(outputs, ctx.avals_out, strict=True)]
        named = dict(zip(fn.arg_names, arguments, strict=False))
        _run(fn, jt.normalize_grid(grid, constants), named | constants)
        return tuple(outputs)

    _callbacks.append(callback)
    number = mlir.ir_constant(np.int32(len(_callbacks) - 1))
    numbered = ctx.replace(avals_in=[jax.core.ShapedArray((), np.int32), *ctx.avals_in])
    lower = jax.ffi.ffi_lowering("xla_ffi_python_cpu_callback")
    return lower(numbered, number, *operands, index=np.uint64(_place(ctx)))


mlir.register_lowering(jt.triton_kernel_call_p, _lower, platform="cpu", cacheable=False)

# A program has a list of its callbacks, made when it is lowered. What runs on a part of sharded
# arrays is lowered later, as a program of its own, and its calls are to that list: with one
# callback for all kernels, first in every list, the places agree.
_callbacks = []


def _call(number, *arrays):
    return _callbacks[int(number)](*arrays)


def _place(ctx):
    """The place of `_call` in the list of callbacks of the program that is lowered."""
    listed = ctx.module_context.host_callbacks
    if _call not in listed:
        ctx.module_context.add_host_callback(_call)
    return listed.index(_call)


def _lower_partitioned(ctx, *operands, **parameters):
    if _place(ctx):
        raise NotImplementedError("sharded arrays beside other callbacks.")
    return _custom_partitioning_lowering_rule(ctx, *operands, **parameters)


mlir.register_lowering(custom_partitioning_p, _lower_partitioned, platform="cpu")
