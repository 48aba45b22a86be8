"""The backend `triton`: fused attention for CUDA GPUs, called through jax-triton.

`kernels.triton.interpret` is the same source on a CPU. Needs the packages triton and jax-triton.
"""

from kernels.triton.attention import attend
from kernels.triton.decoding import decode

__all__ = ["attend", "decode"]
