"""The hot loops: attention, and the instruction `write_read`. Knows arrays only."""

from kernels.attention import attention

__all__ = ["attention"]
