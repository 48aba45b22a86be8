"""What may stand where a matrix of the parameters could, though it is stored in another way."""

import jax
import jax.numpy as jnp


class Matrix:
    """A matrix [in, out], or a table [rows, width], that is not one array.

    Programs multiply by it and look rows up as if it were one. Of an axis of layers in front, which
    `jax.lax.scan` takes apart, its arrays have it all.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        raise NotImplementedError

    @property
    def dtype(self):
        """The type of its numbers."""
        raise NotImplementedError

    @property
    def T(self) -> "Matrix":
        """The transpose of a table, which one multiplies by."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def dot(self, x: jax.Array, exact: bool) -> jax.Array:
        """x [in] times the matrix -> [out]."""
        raise NotImplementedError

    def row(self, n: jax.Array) -> jax.Array:
        """Row n of a table; nan where there is no such row."""
        raise NotImplementedError

    def dense(self) -> jax.Array:
        """The matrix as an array."""
        raise NotImplementedError


def is_matrix(x) -> bool:
    """Whether x is a `Matrix`: what a tree of parameters may have in the place of an array."""
    return isinstance(x, Matrix)


def dense(w: jax.Array | Matrix) -> jax.Array:
    """A matrix as an array."""
    return w.dense() if is_matrix(w) else w


def row(table: jax.Array | Matrix, n: jax.Array) -> jax.Array:
    """Row n of a table, in its own type; nan where there is no such row."""
    if is_matrix(table):
        return table.row(n)
    return jnp.asarray(table).at[n].get(mode="fill", wrap_negative_indices=False)
