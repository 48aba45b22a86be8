"""Numbers that XLA computes once, though several of its loops take them."""

from functools import cache

import jax
import numpy as np

from kernels.cpu.call import Frame, Kernel, register


def once(x):
    """x as it is, copied.

    XLA on a CPU takes arithmetic that it holds for cheap into every loop that needs it, and
    computes it for every number there: the angles of a token for each of its heads. Into a kernel
    it cannot see.
    """
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(register(_kernel()), shape, vmap_method="broadcast_all")
    return call(x, bytes=np.int64(x.dtype.itemsize))


@cache
def _kernel():
    return Kernel("unison_once", lambda frame: frame.code.constant(1), _run)


def _run(frame: Frame, part):
    del part
    size = frame.operand(0).count() * frame.attribute(0)
    frame.code.call("memcpy", frame.result(0).address, frame.operand(0).address, size)
