"""Memory that arrays of a device can take over as it is."""

import math

import numpy as np

from kernels.cpu.tiles import COLUMNS

_ALIGNMENT = 64  # bytes; where JAX on a CPU uses the numbers where they are, without a copy
_COLUMNS = 64


def buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of a shape whose numbers are not set yet."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


def contiguous(x: np.ndarray) -> np.ndarray:
    """The numbers of x in the order of its axes; x itself where they are."""
    if x.flags.c_contiguous:
        return x
    made = buffer(x.shape, x.dtype)
    # x is mostly a transposed matrix: few columns at a time stay in the processor's cache.
    for n in range(0, x.shape[-1], _COLUMNS):
        made[..., n : n + _COLUMNS] = x[..., n : n + _COLUMNS]
    return made


def panels(x: np.ndarray) -> np.ndarray:
    """As `kernels.cpu.product.panels`, in memory that is written once."""
    *front, K, N = x.shape
    made = buffer((*front, -(-N // COLUMNS), K, COLUMNS), x.dtype)
    for n in range(made.shape[-3]):
        part = x[..., n * COLUMNS : (n + 1) * COLUMNS]
        made[..., n, :, : part.shape[-1]] = part
        made[..., n, :, part.shape[-1] :] = 0
    return made
