"""The backend `triton`: fused attention for CUDA GPUs, called through jax-triton.

`triton.interpret` runs the same source on a CPU. Both need the packages triton and jax-triton.
"""

from kernels.backends.triton.attention import attend
from kernels.backends.triton.decoding import decode, read
from kernels.backends.triton.products import product
from kernels.backends.triton.writing import write

__all__ = ["attend", "decode", "product", "read", "write"]
