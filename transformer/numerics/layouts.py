"""Matrices laid out as products of few rows read them fastest.

What is laid out anew is a copy; so it is done once, before a loop of many steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from kernels.cpu import call
from kernels.cpu import product as few_rows
from kernels.cpu.matmul import matmul
from kernels.cpu.tiles import TYPES
from kernels.dot import dot
from kernels.exact.order import order
from kernels.exact.products import product_by_output
from kernels.exact.sums import rounded
from kernels.tracing import primitive
from transformer.numerics.matrix import Matrix, is_matrix, row
from transformer.numerics.products import define, exact_dot, exact_run
from transformer.numerics.quantised import is_quantised

_BLOCK = 512  # terms that fast products sum in one chain
_FEW_ROWS = 64  # so many read a panel once; more have it copied into the nearest cache


@struct.dataclass
class Packed(Matrix):
    """A matrix [in, out] in panels [..., panels, in, 64], which a kernel reads in one go.

    Attributes:
      panels: those of `kernels.cpu.product`.
      scales: of panels of int8, [..., panels, in / group, 64]; None for floats.
      columns: out.
    """

    panels: jax.Array
    scales: jax.Array | None
    columns: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        *front, _, size, _ = self.panels.shape
        return *front, size, self.columns

    @property
    def dtype(self):
        """The type of its numbers."""
        return (self.panels if self.scales is None else self.scales).dtype

    def block(self, exact: bool) -> int:
        """Of how many terms a chain of a sum is; 0 where exact products know no such number."""
        size = self.shape[-2]
        if self.scales is not None:
            return 0 if exact else size // self.scales.shape[-2]
        return order(size, _wide(self.columns), jnp.float32).block if exact else min(size, _BLOCK)

    def dot(self, x: jax.Array, exact: bool) -> jax.Array:
        """x [in] times the matrix -> [out]."""
        if can_share([self], exact):
            return dots(x, [self], exact)[0]
        return exact_dot(x, rounded(self.dense().astype(x.dtype)))

    def dense(self) -> jax.Array:
        """The matrix as an array."""
        return _matrix(self.panels, self.scales)[..., : self.columns]


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


def lay_out(w: jax.Array | Matrix, exact: bool, panels: Callable = few_rows.panels):
    """A matrix w [..., in, out] as it lies best for few rows, which may be as it is.

    Args:
      w: the matrix.
      exact: whether it is for exact products.
      panels: what makes panels of an array, as `kernels.cpu.product.panels`.
    """
    if not call.is_available():
        return w
    if is_quantised(w):
        return w if exact else Packed(panels(w.values), panels(w.scales), w.shape[-1])
    if is_matrix(w) or w.dtype.name not in TYPES:
        return w
    *_, K, N = w.shape
    if exact and not order(K, _wide(N), jnp.float32).block:
        return w
    return Packed(panels(w), None, N)


def lay_out_table(table: jax.Array | Matrix, exact: bool, panels: Callable = few_rows.panels):
    """A table [V, E], of which one looks rows up, and multiplies by its transpose."""
    if isinstance(table, Table):
        return table
    transpose = lay_out(table.T, exact, panels)
    return Table(table, transpose) if isinstance(transpose, Packed) else table


def _wide(columns):
    return columns + -columns % few_rows.COLUMNS


def dot_by_output(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [K] times the transpose of w [N, K], exactly -> [N]."""
    return dot_by_output_p.bind(x[None], w)[0][0]


def can_share(ws: list[jax.Array | Matrix], exact: bool) -> bool:
    """Whether `dots` takes these matrices: all of them packed, and in one way."""
    if not all(isinstance(w, Packed) for w in ws):
        return False
    ways = {(w.block(exact), w.panels.dtype, w.scales is None) for w in ws}
    return len(ways) == 1 and all(block for block, *_ in ways)


def dots(x: jax.Array, ws: list[Packed], exact: bool) -> list[jax.Array]:
    """x [in] times matrices [in, out] -> [[out], ...], each as if it were the only one."""
    arrays = [w.panels for w in ws] + [w.scales for w in ws if w.scales is not None]
    static = {"count": len(ws), "block": ws[0].block(exact), "exact": exact}
    ys = dot_packed_p.bind(x[None], *arrays, **static)
    return [y[0, : w.columns] for y, w in zip(ys, ws, strict=True)]


def _run_packed(x, *arrays, count, block, exact):
    """x [M, K], ws [P, K, 64], scales [P, K / block, 64] if they are int8 -> [[M, 64 P], ...]."""

    def run(x, *arrays):
        ws, scales = arrays[:count], arrays[count:]
        wide = x.astype(jnp.float32)
        if len(x) <= _FEW_ROWS:
            return few_rows.products(wide, ws, block, scales)
        if not scales:
            return [matmul(wide, w, block, "panels") for w in ws]
        return [dot(x, _matrix(*w).astype(x.dtype)) for w in zip(ws, scales, strict=True)]

    if exact:
        return exact_run(run, x, *arrays)
    return [y.astype(x.dtype) for y in run(x, *arrays)]


def _jvp_packed(fun, primals, moving, tangents, *, count, **static):
    """As for `exact_dot`: derivatives have no order to keep."""
    del fun

    def plain(x, *arrays):
        ws, scales = arrays[:count], arrays[count:] or (None,) * count
        return [dot(x, _matrix(*w).astype(x.dtype)) for w in zip(ws, scales, strict=True)]

    _, changes = primitive.jvp_of_moving(plain, primals, moving, tangents)
    return dot_packed_p.bind(*primals, count=count, **static), changes


def _matrix(panels, scales=None):
    """The matrix [..., in, out or more] that is in these panels."""
    w = few_rows.matrix(panels)
    if scales is None:
        return w
    return w * jnp.repeat(few_rows.matrix(scales), w.shape[-2] // scales.shape[-2], -2)


def _run_by_output(x, w):
    """x [M, K], w [N, K] -> [[M, N]]."""
    return exact_run(lambda x, w: [product_by_output(x, w)], x, w)


def _jvp_by_output(fun, primals, moving, tangents):
    """As for `exact_dot`: derivatives have no order to keep."""
    del fun
    x, w = primals
    of = dict(zip(moving, tangents, strict=True))
    terms = [dot(of[0], w, by_output=True)] if 0 in of else []
    terms += [dot(x, of[1], by_output=True)] if 1 in of else []
    return dot_by_output_p.bind(x, w), [sum(terms[1:], terms[0])]


dot_packed_p = define("dot_packed", _run_packed, _jvp_packed)
dot_by_output_p = define("dot_by_output", _run_by_output, _jvp_by_output)
