"""How each kernel is launched: as a fixed table says for an architecture, head size and dtype.

There is no tuning at run time, since it would make the numbers of one run differ from those of the
next.
"""

import contextlib
import contextvars
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.backends.triton.table import TABLE

MULTIPLE = 8  # numbers of a head that the kernels load at once; other sizes spill registers
LARGEST = 256  # head size, of keys and of values
LARGEST_DECODED = 1024  # as the latent vectors of arXiv:2405.04434 need, of 512 and 64 numbers
INTERPRETER = 0  # the architecture that runs the kernels' source on the CPU

_trial = contextvars.ContextVar("triton_trial", default=(None, None))


class Launch(NamedTuple):
    """The tiles of queries and of keys, the number of warps, and the stages of the pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@contextlib.contextmanager
def trial(kernel: str, launch: Launch):
    """Launches one kernel in another way than the table says, in order to try it.

    It is read while tracing: a function that `jit` has traced before keeps its launch.
    """
    token = _trial.set((kernel, launch))
    try:
        yield
    finally:
        _trial.reset(token)


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def width(head_size: int) -> int:
    """The head size that the kernels compute with: a power of two, at least 32."""
    return max(32, power_of_two(head_size))


def bits(dtype) -> int:
    """Bits of a number as products take it: 19 where float32 is multiplied as TF32.

    XLA does that too on GPUs, unless `jax_default_matmul_precision` asks for more.
    """
    dtype = jnp.dtype(dtype)
    asked = jax.config.jax_default_matmul_precision
    tf32 = dtype == jnp.float32 and asked not in ("highest", "float32", "F32_F32_F32")
    return 19 if tf32 else 8 * dtype.itemsize


def precision(architecture: int, head_size: int, dtype) -> str:
    """As `tl.dot` has it: TF32 where `bits` says so and a launch fits."""
    return "tf32" if _kind(architecture, head_size, dtype) == 19 else "ieee"


def _kind(architecture, head_size, dtype):
    fits = (_FAMILY.get(architecture), bits(dtype), width(head_size)) in TABLE
    return bits(dtype) if fits else 8 * jnp.dtype(dtype).itemsize


def score_constants(options, architecture, head_size, value_size, dtype, alibi):
    """The constants that all kernels share: the sizes of a head and how a score is made."""
    plain = options.soft_cap is None and alibi is None
    return {
        "H": head_size,
        "WIDTH": width(head_size),
        "HV": value_size,
        "VALUE_WIDTH": width(value_size),
        "PRECISION": precision(architecture, max(head_size, value_size), dtype),
        "SCALE": options.scale,
        "WINDOW": options.window,
        "SOFT_CAP": options.soft_cap,
        "UNIT": math.log2(math.e) * (options.scale if plain else 1),
        "HAS_ALIBI": alibi is not None,
    }


def split_size(architecture: int, blocks: int, cells: int) -> int:
    """How many cells one program reads where cells are split, of `blocks` blocks of `cells` cells.

    The number is small, so that one sequence fills a GPU, but never so small that there are more
    programs than keep a GPU busy: each costs a part that the second kernel must merge.
    """
    size = 128 if architecture == INTERPRETER else 256
    while size < cells and blocks * -(-cells // size) > 2048:
        size *= 2
    return size


def launch(kernel: str, architecture: int, head_size: int, dtype) -> Launch:
    """How a kernel is launched: as the table says for forward, dq, dkdv, split and decode.

    Raises:
      NotImplementedError: the table has no entry for the architecture, head size or dtype.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"triton kernels take float32, bfloat16, float16; got {dtype}.")
    largest = LARGEST if kernel in ("forward", "dq", "dkdv", "split") else LARGEST_DECODED
    if head_size > largest:
        what = "for several tokens" if largest == LARGEST else "for one token"
        raise NotImplementedError(
            f"triton kernels take a head size up to {largest} {what}; got {head_size}."
        )
    tried, how = _trial.get()
    if kernel == tried:
        return how
    if kernel in _ALWAYS:
        return _ALWAYS[kernel]
    if architecture == INTERPRETER:
        return _INTERPRETED[kernel]
    if architecture not in _FAMILY:
        known = ", ".join(str(a / 10) for a in _FAMILY)
        raise NotImplementedError(
            f"triton kernels run on compute capability {known}; got {architecture / 10}."
        )
    kind = _kind(architecture, head_size, dtype)
    launches = TABLE.get((_FAMILY[architecture], kind, width(head_size)), {})
    if kernel not in launches:
        raise NotImplementedError(
            f"the triton kernel {kernel!r} with {dtype} heads of {head_size} numbers does not fit "
            f"compute capability {architecture / 10}."
        )
    return Launch(*launches[kernel])


# The family whose entries an architecture uses. Those of 80 fit the smaller shared memory of
# workstation and consumer chips, 99 KiB.
_FAMILY = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 120: 80}


# What only moves data, or next to nothing, and products in one order of sums.
_ALWAYS = {
    "combine": Launch(1, 16, 4, 2),
    "merge": Launch(4, 16, 4, 2),
    "write": Launch(16, 16, 4, 1),
    "product": Launch(64, 64, 4, 3),
}

# Small tiles, unequal on purpose, so that small arrays have several of them.
_INTERPRETED = {
    "forward": Launch(64, 128, 4, 1),
    "dq": Launch(64, 128, 4, 1),
    "dkdv": Launch(128, 64, 4, 1),
    "split": Launch(32, 64, 4, 1),
    "decode": Launch(16, 64, 4, 1),
}
