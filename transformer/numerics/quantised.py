"""Matrices of int8 numbers, of which a group shares a scale: a quarter of the size of float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from kernels.exact.sums import rounded
from transformer.numerics.matrix import Matrix, row
from transformer.numerics.products import define, exact_dot

GROUP = 64  # numbers that share a scale, at most
_FEWEST = 16  # numbers for which a scale is worth its four bytes
_TILE = 768  # rows of a table that are floats at a time


@struct.dataclass
class Quantised(Matrix):
    """Its numbers are values * scales.

    Attributes:
      values: int8 [..., in, out].
      scales: float32 [..., in / G, out]: one for every G numbers along `in`. A table, whose rows
        are looked up, has them along its last axis instead.
      is_table: whether it is a table, or the transpose of one, whose columns lie together.
    """

    values: jax.Array
    scales: jax.Array
    is_table: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.values.shape

    @property
    def dtype(self):
        """The type of its numbers."""
        return self.scales.dtype

    @property
    def T(self) -> "Quantised":
        """The transpose of a matrix [in, out]."""
        return self.replace(values=self.values.T, scales=self.scales.T)

    def dot(self, x: jax.Array, exact: bool) -> jax.Array:
        """x [in] times the matrix -> [out]; exact products take it as an array of floats."""
        if exact:
            return exact_dot(x, rounded(self.dense().astype(x.dtype)))
        return quantised_dot(x, self)

    def row(self, n: jax.Array) -> jax.Array:
        """Row n of a table."""
        return jax.tree.map(lambda x: row(x, n), self).dense()

    def dense(self) -> jax.Array:
        """The matrix as an array of floats."""
        scales = self.scales
        for axis, size in enumerate(self.shape):
            scales = jnp.repeat(scales, size // scales.shape[axis], axis)
        return self.values * scales


def is_quantised(x) -> bool:
    """Whether x is `Quantised`."""
    return isinstance(x, Quantised)


def quantise(x: np.ndarray, *, is_table: bool = False) -> Quantised | np.ndarray:
    """Rounds a matrix to 255 steps between the largest number of a group and its negative.

    Args:
      x: [..., in, out], or a table.
      is_table: whether it is a table. Of the axis that products sum over, the last one then, G
        numbers share a scale, `GROUP` or a divisor of it; a matrix is left as it is where that
        would be fewer than 16.
    """
    axis = x.ndim - (1 if is_table else 2)
    group = math.gcd(x.shape[axis], GROUP)
    if group < _FEWEST:
        return x
    grouped = np.asarray(x, np.float32).reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])
    scales = np.abs(grouped).max(axis + 1) / np.float32(127)
    steps = grouped / np.expand_dims(np.where(scales == 0, 1, scales), axis + 1)
    return Quantised(np.rint(steps).astype(np.int8).reshape(x.shape), scales, is_table)


def quantised_dot(x: jax.Array, w: Quantised) -> jax.Array:
    """x [K] @ w [K, N] -> [N], summed in float32.

    A primitive, which sees how many tokens `vmap` maps.
    """
    return quantised_dot_p.bind(x[None], w.values, w.scales, is_table=w.is_table)[0][0]


# A part of the matrix at a time is made floats, which stay in the processor's cache. Left to itself
# XLA on a CPU writes all of them to memory, or fuses making them with a product that is slow.
def _run(x, values, scales, is_table):
    """x [M, K], values [K, N], scales [K / G, N] -> [[M, N]]."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    wide_x = x.astype(wide)
    if is_table:

        def column(column):
            values, scales = column
            floats = values.reshape(len(scales), -1) * scales[:, None]
            return wide_x @ floats.reshape(-1).astype(wide)

        y = jax.lax.map(column, (values.T, scales.T), batch_size=_TILE)
        return [y.T.astype(x.dtype)]

    def add(total, group):
        x, values, scales = group
        return total + (x @ values.astype(wide)) * scales, None

    groups, N = scales.shape
    parts = wide_x.reshape(len(x), groups, -1).swapaxes(0, 1)
    zeros = jnp.zeros((len(x), N), wide)
    total, _ = jax.lax.scan(add, zeros, (parts, values.reshape(groups, -1, N), scales))
    return [total.astype(x.dtype)]


quantised_dot_p = define("quantised_dot", _run)
