"""A token's product with a matrix, as primitives that see how many tokens run beside it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core

from kernels.dot import dot, has_kernel
from kernels.exact.products import grouped, product
from kernels.exact.sums import rounded
from kernels.ragged_dot import ragged_dot
from kernels.tracing import primitive


def define(name: str, run: Callable, jvp: Callable | None = None) -> core.Primitive:
    """Makes a primitive of products, with x [M, K] as first operand and results [[M, N], ...].

    Mapped tokens become rows; where matrices are mapped, products run one after the other.

    Args:
      name, jvp: as in `primitive.define`.
      run: `run(x, *w, **static) -> [y, ...]`, where w are arrays that make up the matrices.
    """

    def batch(axis, operands, dims, **static):
        if dims[0] is None or any(dim is not None for dim in dims[1:]):
            return primitive.in_turn(made, operands, dims, **static)
        x, *w = operands
        x = jnp.moveaxis(x, dims[0], 0)
        ys = made.bind(x.reshape(-1, x.shape[-1]), *w, **static)
        return [y.reshape(axis.size, -1, y.shape[-1]) for y in ys], [0] * len(ys)

    made = primitive.define(name, run, batch, jvp)
    return made


def fast_dot(x, w, by_output=False):
    """x [K] @ w [K, N] -> [N], with w [N, K] if `by_output`."""
    if has_kernel():
        return dot(x[None], w, by_output=by_output)[0]
    return x @ (w.T if by_output else w)  # width first: vmap then needs no transpose


def exact_dot(x, w):
    """x [K] @ w [K, N] -> [N]; narrow types are multiplied and summed in float32.

    Its bits do not depend on the tokens that run beside it. Its derivatives are those of a plain
    product.
    """
    return exact_dot_p.bind(x[None], w)[0][0]


def exact_run(products, x, *w):
    """`products(x, *w)` of x [M, K], a list, each rounded to the type of x."""
    if x.dtype.itemsize >= 4:
        return products(x, *w)
    return [rounded(y.astype(x.dtype)) for y in products(rounded(x), *w)]


def _run(x, w):
    """x [M, K], w [K, N] -> [[M, N]]."""
    return exact_run(lambda x, w: [product(x, w)], x, w)


def _jvp(fun, primals, moving, tangents):
    """The tangent of a product is a sum of plain products: derivatives have no order to keep."""
    del fun
    x, w = primals
    of = dict(zip(moving, tangents, strict=True))
    terms = [dot(of[0], w)] if 0 in of else []
    terms += [dot(x, of[1])] if 1 in of else []
    return exact_dot_p.bind(x, w), [sum(terms[1:], terms[0])]


exact_dot_p = define("exact_dot", _run, _jvp)


@jax.custom_jvp
def exact_ragged_dot(x, w, sizes):
    """`ragged_dot`, a row as if it were the only one; derivatives are the plain ones."""
    return exact_run(lambda x, w: [grouped(x, w, sizes)], x, w)[0]


@exact_ragged_dot.defjvp
def _ragged_dot_jvp(primals, tangents):
    (x, w, sizes), (dx, dw, _) = primals, tangents
    change = ragged_dot(dx, w, sizes) + ragged_dot(x, dw, sizes)
    return exact_ragged_dot(x, w, sizes), change
