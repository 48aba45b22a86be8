"""What layers compute with: products, sums and what stands by itself, fast or exact.

A layer calls these and knows nothing else. Exact means that a token's bits are the same however it
runs: alone or with others of its sequence, in any chunk and any batch, with or without a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels.cpu.once import once
from kernels.dot import has_kernel
from kernels.exact import functions, sums
from kernels.exact.total import total
from kernels.ragged_dot import ragged_dot
from transformer.numerics import layouts, log_softmax
from transformer.numerics.matrix import is_matrix
from transformer.numerics.products import exact_dot, exact_ragged_dot, fast_dot

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
        if is_matrix(w):
            return w.dot(x, self.exact)
        w = self.cast(w, x.dtype)
        return exact_dot(x, w) if self.exact else fast_dot(x, w)

    def dots(self, x, ws):
        """x [K] times each matrix of a list -> [[N], ...], in one go where that is faster."""
        if layouts.can_share(ws, self.exact):
            return layouts.dots(x, ws, self.exact)
        return [self.dot(x, w) for w in ws]

    def dot_table(self, x, table):
        """x [E] times the transpose of a table [V, E] -> [V], in the type of x."""
        if is_matrix(table):
            return table.T.dot(x, self.exact)
        table = self.cast(table, x.dtype)
        return layouts.dot_by_output(x, table) if self.exact else fast_dot(x, table, by_output=True)

    def ragged_dot(self, x, w, sizes):
        """Rows [M, K] sorted by group, times the matrix of each, w [X, K, N]; sizes [X]."""
        w = self.cast(w, x.dtype)
        dot = exact_ragged_dot if self.exact else ragged_dot
        return dot(x, w, sizes)

    def mixture(self, weights, x):
        """weights [M, k], x [M, k, N] -> [M, N], the sum of k terms."""
        if not self.exact:
            return jnp.einsum("mk,mke->me", weights, x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        terms = self.rounded(weights).astype(wide)[..., None] * x.astype(wide)
        return self.rounded(self.sum(terms, axis=1)[:, 0].astype(x.dtype))

    def softmax(self, x):
        """Over the last axis."""
        if not self.exact:
            return jax.nn.softmax(x)
        powers = functions.exp(x - x.max(-1, keepdims=True))
        return self.rounded(powers / total(powers)[..., None])

    def mean(self, x):
        """The mean over the last axis, which is kept with one element."""
        if self.exact:
            return sums.rounded(total(x)[..., None] / x.shape[-1])
        return x.mean(-1, keepdims=True)

    def sum(self, x, axis=-1):
        """The sum over one axis, which is kept with one element."""
        if not self.exact:
            return x.sum(axis, keepdims=True)
        if x.shape[axis] <= sums.WAYS:
            return jnp.expand_dims(sums.short(x, axis), axis)
        return jnp.expand_dims(total(jnp.moveaxis(x, axis, -1)), axis)

    def inner(self, x, y):
        """The sum of x * y, both [V]."""
        return total(x * y) if self.exact else jnp.vdot(x, y, precision="highest")

    def cross_entropy(self, logits, targets):
        """As `log_softmax.cross_entropy`: of logits [..., V] and targets [...], (nll, lse)."""
        return log_softmax.cross_entropy(logits, targets, self.exact)

    def log_sum_exp(self, x):
        """log(sum(exp(x))) over the last axis."""
        return log_softmax.log_sum_exp(x, self.exact)

    def rounded(self, x):
        """x, rounded to its type: what a product must be before it feeds a sum."""
        return sums.rounded(x) if self.exact else x

    def cast(self, x, dtype):
        """x in a type, rounded to it if that is another one than its own."""
        return x if x.dtype == dtype else self.rounded(x.astype(dtype))

    def narrowed(self, x):
        """x, rounded to its type if that is a narrow one: what a sum must be before it is used."""
        return self.rounded(x) if x.dtype.itemsize < 4 else x

    def rsqrt(self, x):
        """1 / sqrt(x)."""
        if not self.exact:
            return jax.lax.rsqrt(x)
        return 1 / self.rounded(jnp.sqrt(x))  # both rounded rightly; rsqrt is approximated

    def exp(self, x):
        """The exponential."""
        return functions.exp(x) if self.exact else jnp.exp(x)

    def log(self, x):
        """The natural logarithm."""
        return functions.log(x) if self.exact else jnp.log(x)

    def tanh(self, x):
        """The hyperbolic tangent."""
        return functions.tanh(x) if self.exact else jnp.tanh(x)

    def sin(self, x):
        """The sine."""
        return functions.sin(x) if self.exact else jnp.sin(x)

    def cos(self, x):
        """The cosine."""
        return functions.cos(x) if self.exact else jnp.cos(x)

    def once(self, x):
        """x, without a gradient, where several operations take it and none is to compute it anew.

        The functions here that are exact are many cheap operations, others are one that is not.
        """
        return once(x) if self.exact and has_kernel() else x

    def sigmoid(self, x):
        """1 / (1 + exp(-x))."""
        return functions.sigmoid(x) if self.exact else jax.nn.sigmoid(x)

    def silu(self, x):
        """x * sigmoid(x)."""
        return functions.silu(x) if self.exact else jax.nn.silu(x)

    def softplus(self, x):
        """log(1 + exp(x))."""
        return functions.softplus(x) if self.exact else jax.nn.softplus(x)

    def gelu(self, x, approximate=True):
        """GELU (arXiv:1606.08415), in its tanh form where it is approximate."""
        if not self.exact:
            return jax.nn.gelu(x, approximate)
        return functions.gelu(x) if approximate else functions.gelu_exact(x)

    def gumbel(self, key, shape):
        """Random numbers of the standard Gumbel distribution, float32."""
        if not self.exact:
            return jax.random.gumbel(key, shape)
        uniform = jax.random.uniform(key, shape, minval=jnp.finfo(jnp.float32).tiny)
        return -self.log(-self.log(uniform))


FAST = Numerics()
EXACT = Numerics("exact")


def numerics_of(f: Callable) -> Numerics:
    """What a program computes with; fast, unless it says otherwise by its `numerics`."""
    return getattr(f, "numerics", FAST)
