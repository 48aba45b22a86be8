"""The hot loops: attention and the instruction `write_read`, on arrays alone."""

from kernels.attention import attention

__all__ = ["attention"]
