"""Matrices laid out for the number of rows that they will be multiplied with.

A library for products is as fast as a matrix lies well for it. What is laid out anew is a copy; so
it is done once, before a loop of many steps.
"""

import jax
import jax.numpy as jnp
from flax import struct

from kernels.exact.order import order
from kernels.exact.products import blocks_of, filled, product_by_output, product_of_parts
from transformer.numerics.matrix import Matrix, is_matrix, row
from transformer.numerics.products import define, exact_run

_FEW_ROWS = 64  # up to which a matrix that is stored by output is the faster one


@struct.dataclass
class ByOutput(Matrix):
    """A matrix [in, out], stored as values [..., out or more, in]: better for two rows to many."""

    values: jax.Array
    columns: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        *front, _, size = self.values.shape
        return *front, size, self.columns

    @property
    def dtype(self):
        """The type of its numbers."""
        return self.values.dtype

    def dot(self, x: jax.Array, exact: bool) -> jax.Array:
        """x [in] times the matrix -> [out]."""
        return dot_by_output_p.bind(x[None], self.values, exact=exact)[0][0, : self.columns]

    def dense(self) -> jax.Array:
        """The matrix as an array."""
        return self.values.swapaxes(-1, -2)[..., : self.columns]


@struct.dataclass
class Parts(Matrix):
    """A matrix [in, out] in parts [..., some of in, out or more]: for one row in exact numerics."""

    parts: list[jax.Array]
    columns: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return *self.parts[0].shape[:-2], sum(x.shape[-2] for x in self.parts), self.columns

    @property
    def dtype(self):
        """The type of its numbers."""
        return self.parts[0].dtype

    def dot(self, x: jax.Array, exact: bool) -> jax.Array:
        """x [in] times the matrix -> [out]."""
        del exact
        return dot_of_parts_p.bind(x[None], *self.parts)[0][0, : self.columns]

    def dense(self) -> jax.Array:
        """The matrix as an array."""
        return jnp.concatenate(self.parts, -2)[..., : self.columns]


@struct.dataclass
class Table(Matrix):
    """A table [rows, width], and its transpose as one multiplies by it."""

    rows: jax.Array
    transpose: jax.Array | Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, width]."""
        return self.rows.shape

    @property
    def dtype(self):
        """The type of its numbers."""
        return self.rows.dtype

    @property
    def T(self):
        """[width, rows]."""
        return self.transpose

    def row(self, n: jax.Array) -> jax.Array:
        """Row n."""
        return row(self.rows, n)

    def dense(self) -> jax.Array:
        """The table as an array."""
        return self.rows


def lay_out(w: jax.Array, rows: int, exact: bool) -> jax.Array | Matrix:
    """A matrix w [..., in, out] as it lies best for so many rows, which may be as it is."""
    if not exact:
        is_better = 1 < rows <= _FEW_ROWS
        return ByOutput(w.swapaxes(-1, -2), w.shape[-1]) if is_better else w
    K, N = w.shape[-2:]
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    if rows == 1:
        parts = blocks_of(wide)
        as_it_is = len(parts) == 1 and parts[0].shape == w.shape and wide.dtype == w.dtype
        return w if as_it_is else Parts(parts, N)
    stored = filled(wide.swapaxes(-1, -2), -2)
    ordered = order(K, stored.shape[-2], wide.dtype).by_output
    return ByOutput(stored, N) if ordered else w


def lay_out_table(table: jax.Array, rows: int, exact: bool) -> jax.Array | Matrix:
    """A table [V, E], of which one looks rows up, and multiplies by its transpose."""
    transpose = lay_out(table.T, rows, exact)
    return Table(table, transpose) if is_matrix(transpose) else table


def _run_by_output(x, w, exact):
    """x [M, K], w [N, K] -> [[M, N]]."""
    if exact:
        return exact_run(product_by_output, x, w)
    if not 1 < len(x) <= _FEW_ROWS:
        return [x @ w.T]
    # The matrix comes first: the library is faster so. Without the barrier XLA turns it around.
    y = jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())))
    return [jax.lax.optimization_barrier(y).T]


def _jvp_by_output(fun, primals, moving, tangents, exact):
    """As for `exact_dot`: derivatives have no order to keep."""
    del fun
    x, w = primals
    of = dict(zip(moving, tangents, strict=True))
    terms = [of[0] @ w.T] if 0 in of else []
    terms += [x @ of[1].T] if 1 in of else []
    return dot_by_output_p.bind(x, w, exact=exact), [sum(terms[1:], terms[0])]


def _run_of_parts(x, *parts):
    return exact_run(lambda x, *parts: product_of_parts(x, parts), x, *parts)


dot_by_output_p = define("dot_by_output", _run_by_output, _jvp_by_output)
dot_of_parts_p = define("dot_of_parts", _run_of_parts)
