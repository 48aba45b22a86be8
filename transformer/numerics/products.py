"""A token's product with a matrix, whose bits do not depend on the tokens that run beside it."""

import jax
import jax.numpy as jnp

from kernels.exact.products import grouped, product
from kernels.exact.sums import rounded
from kernels.tracing import primitive


def exact_dot(x, w):
    """x [K] @ w [K, N] -> [N]; narrow types are multiplied and summed in float32.

    A primitive, which sees how many tokens `vmap` maps. Its derivatives are those of a plain
    product.
    """
    return exact_dot_p.bind(x[None], w)[0][0]


def _run(x, w):
    """x [M, K], w [K, N] -> [[M, N]]."""
    return [rounded(product(rounded(x), w).astype(x.dtype))]


def _batch(axis, operands, dims):
    """Mapped tokens become rows; products with several matrices run one after the other."""
    (x, w), (x_dim, w_dim) = operands, dims
    if x_dim is None and w_dim is None:
        return exact_dot_p.bind(x, w), [None]
    if w_dim is not None:
        w = jnp.moveaxis(w, w_dim, 0)
        if x_dim is None:
            return [jax.lax.map(lambda w: exact_dot_p.bind(x, w)[0], w)], [0]
        pairs = jnp.moveaxis(x, x_dim, 0), w
        return [jax.lax.map(lambda pair: exact_dot_p.bind(*pair)[0], pairs)], [0]
    x = jnp.moveaxis(x, x_dim, 0)
    [y] = exact_dot_p.bind(x.reshape(-1, x.shape[-1]), w)
    return [y.reshape(axis.size, -1, y.shape[-1])], [0]


def _jvp(fun, primals, moving, tangents):
    """The tangent of a product is a sum of plain products: derivatives have no order to keep."""
    del fun
    x, w = primals
    of = dict(zip(moving, tangents, strict=True))
    terms = [of[0] @ w] if 0 in of else []
    terms += [x @ of[1]] if 1 in of else []
    return exact_dot_p.bind(x, w), [sum(terms[1:], terms[0])]


exact_dot_p = primitive.define("exact_dot", _run, _batch, _jvp)


@jax.custom_jvp
def exact_ragged_dot(x, w, sizes):
    """`jax.lax.ragged_dot`, a row as if it were the only one; derivatives are the plain ones."""
    return rounded(grouped(rounded(x), w, sizes).astype(x.dtype))


@exact_ragged_dot.defjvp
def _ragged_dot_jvp(primals, tangents):
    (x, w, sizes), (dx, dw, _) = primals, tangents
    change = jax.lax.ragged_dot(dx, w, sizes) + jax.lax.ragged_dot(x, dw, sizes)
    return exact_ragged_dot(x, w, sizes), change
