"""What layers compute with: products, sums and what stands by itself, fast or exact.

A layer calls these and knows nothing else. Exact means that a token's bits are the same however it
runs: alone or with others of its sequence, in any chunk and any batch, with or without a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kernels.exact import sums
from transformer.numerics.products import exact_dot

NAMES = ("fast", "exact")


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of a program.

    Attributes:
      name: "fast" or "exact".

    Raises:
      ValueError: there is no such name.
    """

    name: str = "fast"

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(
                f"numerics={self.name!r} does not exist; choose one of {', '.join(NAMES)}."
            )

    @property
    def exact(self) -> bool:
        """Whether a token's bits are the same however it runs."""
        return self.name == "exact"

    def dot(self, x, w):
        """x [K] @ w [K, N] -> [N], in the type of x."""
        w = w.astype(x.dtype)
        return exact_dot(x, w) if self.exact else x @ w

    def mean(self, x):
        """The mean over the last axis, which is kept with one element."""
        if self.exact:
            return sums.total(x)[..., None] / x.shape[-1]
        return x.mean(-1, keepdims=True)

    def sum(self, x):
        """The sum over the last axis, which is kept with one element."""
        return sums.total(x)[..., None] if self.exact else x.sum(-1, keepdims=True)

    def alone(self, function: Callable) -> Callable:
        """A function of arrays whose roundings do not depend on what is computed around it."""
        return sums.alone(function) if self.exact else function

    def rounded(self, x):
        """Arrays in their type: a product as it is rounded, before it feeds a sum."""
        return sums.apart(x) if self.exact else x


FAST = Numerics()
EXACT = Numerics("exact")
