"""A linear map with a transpose of our own, as a JAX primitive.

JAX differentiates in reverse by transposing the tangent map. Where we know a better transpose than
JAX would find, such as the backward pass of a kernel, the tangent map is one `linear_call`: forward
mode runs the map, reverse mode runs our transpose, and `vmap` and `jit` work on both.
`jax.custom_derivatives.linear_call` can be neither mapped nor differentiated in its residuals.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from kernels.tracing.partition import vary_like


def linear_call(
    fun: Callable, transpose: Callable, residuals: Any, operands: Any, results: Any = None
) -> Any:
    """Calls `fun(residuals, operands)`, which is linear in its operands.

    All arguments and results are pytrees. Neither function may close over tracers.

    Args:
      fun: `fun(residuals, operands) -> results`. Where the residuals have tangents, JAX
        differentiates it in forward mode.
      transpose: `transpose(residuals, cotangents) -> cotangents of the operands`, where
        `cotangents` has the structure of the results. It is traced in place, so it can be
        differentiated too.
      residuals: what the map depends on; they may hold integers and None.
      operands: arrays of floating-point numbers.
      results: arrays of the shapes and dtypes of the results, if they are known; reverse mode then
        never traces `fun`. If None, `fun` is traced for them.

    Returns:
      The results of `fun`.

    Raises:
      TypeError: an operand is not floating-point, or `transpose` returns another structure than
        that of the operands.
    """
    for x in jax.tree.leaves(operands):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            raise TypeError(
                f"linear_call got an operand of dtype {jnp.result_type(x)}; the map is linear in "
                "its operands, so they must be floating-point. Pass integers as residuals."
            )
    residuals, operands = vary_like((residuals, operands), (residuals, operands))
    if results is None:
        results = jax.eval_shape(fun, residuals, operands)
    shapes, out_tree = jax.tree.flatten(results)
    flat, tree = jax.tree.flatten((residuals, operands))
    results = linear_call_p.bind(
        *flat,
        fun=fun,
        transpose=transpose,
        tree=tree,
        out_tree=out_tree,
        shapes=tuple((x.shape, x.dtype) for x in shapes),
    )
    return jax.tree.unflatten(out_tree, results)


linear_call_p = core.Primitive("linear_call")
linear_call_p.multiple_results = True


@linear_call_p.def_impl
def _run(*flat, fun, tree, **_):
    return vary_like(jax.tree.leaves(fun(*jax.tree.unflatten(tree, flat))), flat)


@linear_call_p.def_abstract_eval
def _(*avals, shapes, **_):
    like = lambda *arrays: vary_like([jnp.zeros(*shape) for shape in shapes], arrays)
    return jax.make_jaxpr(like)(*avals).out_avals


mlir.register_lowering(linear_call_p, mlir.lower_fun(_run, multiple_results=True))
dispatch.prim_requires_devices_during_lowering.add(linear_call_p)  # see `primitive.define`


def _parts(tree, flat):
    """The leaves of the residuals, and those of the operands."""
    count = tree.children()[0].num_leaves
    return list(flat[:count]), list(flat[count:])


def _jvp(primals, tangents, **params):
    residuals, operands = _parts(params["tree"], primals)
    of_residuals, of_operands = _parts(params["tree"], tangents)
    results, changes = linear_call_p.bind(*primals, **params), []
    if not all(type(t) is ad.Zero for t in of_operands):
        moved = map(ad.instantiate_zeros, of_operands)
        changes.append(linear_call_p.bind(*residuals, *moved, **params))
    moving = [n for n, t in enumerate(of_residuals) if type(t) is not ad.Zero]
    if moving:

        def of_moving(*arrays):
            given = list(residuals)
            for n, x in zip(moving, arrays, strict=True):
                given[n] = x
            return _run(*given, *operands, **params)

        pairs = [(residuals[n], of_residuals[n]) for n in moving]
        changes.append(jax.jvp(of_moving, *zip(*pairs, strict=True))[1])
    return results, [sum(terms[1:], terms[0]) for terms in zip(*changes, strict=True)]


def _transpose(cotangents, *flat, transpose, tree, out_tree, **_):
    residuals, operands = _parts(tree, flat)
    cotangents = list(map(ad.instantiate_zeros, cotangents))
    residuals_tree, operands_tree = tree.children()
    results = transpose(
        jax.tree.unflatten(residuals_tree, residuals), jax.tree.unflatten(out_tree, cotangents)
    )
    leaves, structure = jax.tree.flatten(results)
    if structure != operands_tree:
        raise TypeError(
            f"the transpose of a linear_call returned {structure}; it must return a cotangent for "
            f"each operand, {operands_tree}."
        )
    leaves = vary_like(leaves, (residuals, cotangents))
    # An operand that is known, a zero tangent, takes no part in the transposition.
    return [None] * len(residuals) + [
        x if ad.is_undefined_primal(operand) else None
        for x, operand in zip(leaves, operands, strict=True)
    ]


def _batch(axis, flat, dims, *, fun, transpose, tree, out_tree, shapes):
    rest = {"tree": tree, "out_tree": out_tree}
    if all(dim is None for dim in dims):
        results = linear_call_p.bind(*flat, fun=fun, transpose=transpose, shapes=shapes, **rest)
        return results, [None] * len(results)
    mapped = partial(
        jax.vmap,
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    in_axes = jax.tree.unflatten(tree, dims)
    _, of_operands = _parts(tree, dims)

    def back(residuals, cotangents):
        results = mapped(transpose, in_axes=(in_axes[0], 0))(residuals, cotangents)
        leaves, structure = jax.tree.flatten(results)
        # All of the axis reads an operand that is not mapped.
        leaves = [
            x.sum(0) if dim is None else jnp.moveaxis(x, 0, dim)
            for x, dim in zip(leaves, of_operands, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves)

    results = linear_call_p.bind(
        *flat,
        fun=mapped(fun, in_axes=in_axes),
        transpose=back,
        shapes=tuple(((axis.size, *shape), dtype) for shape, dtype in shapes),
        **rest,
    )
    return results, [0] * len(results)


ad.primitive_jvps[linear_call_p] = _jvp
ad.primitive_transposes[linear_call_p] = _transpose
batching.fancy_primitive_batchers[linear_call_p] = _batch
