"""The static choices of one attention, shared by every backend."""

import math
import operator
from dataclasses import dataclass

import jax


@jax.tree_util.register_static
@dataclass(frozen=True)
class Options:
    """How scores are made and which keys are seen; a static argument, also as a pytree.

    Attributes:
      scale: the factor on q.k, which must be above 0; usually 1 / sqrt(H).
      window: a query at position i sees the positions i - window + 1 .. i; at least 1. If None, it
        sees all positions up to i.
      soft_cap: a scaled score becomes soft_cap * tanh(score / soft_cap), as in Gemma 2
        (arXiv:2408.00118); above 0. If None, scores stay as they are.
      exact: whether what a query reads has the same bits whatever runs beside it, and however large
        the block is: sums run over tiles of cells that begin at multiples of their size from the
        first position on, in one order.

    NumPy's numbers are turned into Python's, which compilers of kernels take for constants.

    Raises:
      ValueError: a number is out of its range.
      TypeError: window is not an integer.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    exact: bool = False

    def __post_init__(self):
        for name in ("scale", "soft_cap"):
            value = getattr(self, name)
            if value is None and name == "soft_cap":
                continue
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value}; it must be a number above 0.")
            object.__setattr__(self, name, float(value))
        if self.window is not None:
            try:
                object.__setattr__(self, "window", operator.index(self.window))
            except TypeError:
                raise TypeError(f"window={self.window}; it must be an integer, or None.") from None
            if self.window < 1:
                raise ValueError(
                    f"window={self.window}; it must be at least 1: a query sees its own position."
                )
