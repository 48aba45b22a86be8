"""Kernels for a CPU: machine code written in Python, compiled by LLVM and called by XLA."""
