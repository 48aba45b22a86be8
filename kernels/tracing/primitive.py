"""A JAX primitive whose batching rule is ours.

`jax.custom_batching.custom_vmap` cannot be differentiated in reverse, and `jax.custom_vjp` cannot
change what `vmap` means. A primitive can do both: it stands in the jaxpr under its own name, the
batching rule is ours, and differentiation goes through the function that defines it.
"""

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def define(
    name: str, fun: Callable, batch: Callable, jvp: Callable | None = None
) -> core.Primitive:
    """Makes a primitive that has several results out of a function of arrays.

    Args:
      name: the primitive's name, as it appears in jaxprs.
      fun: `fun(*arrays, **params) -> list of arrays` is the primitive's meaning. It is lowered by
        tracing it.
      batch: `batch(axis, operands, dims, **params) -> (results, result_dims)`. `axis` has the
        `name` and the `size` of the mapped axis; `dims` holds the mapped axis of each operand, or
        None where an operand is not mapped. It is called for every axis, also where no operand is
        mapped.
      jvp: `jvp(fun, primals, moving, tangents, **params) -> (results, tangents)`, where `moving`
        holds the indices of the operands that have a tangent. If None, JAX differentiates `fun`.

    Returns:
      The primitive; call it with `primitive.bind(*arrays, **params)`.
    """
    jvp = jvp or jvp_of_moving
    primitive = core.Primitive(name)
    primitive.multiple_results = True

    @primitive.def_impl
    def _(*operands, **params):
        return jax.jit(partial(fun, **params))(*operands)

    # Tracing the function is most of what binding costs, and layers are alike.
    @functools.lru_cache(maxsize=256)
    def out_avals(avals, params, _):
        return jax.make_jaxpr(partial(fun, **dict(params)))(*avals).out_avals

    @primitive.def_abstract_eval
    def _(*avals, **params):
        return out_avals(avals, tuple(params.items()), jax.config.jax_enable_x64)

    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=True))
    # What is split over devices (kernels/tracing/partition.py) must know them when it is lowered;
    # JAX looks for that in the jaxpr, where the function is not seen.
    dispatch.prim_requires_devices_during_lowering.add(primitive)

    batching.fancy_primitive_batchers[primitive] = batch

    def jvp_rule(primals, tangents, **params):
        # Only operands with a tangent take part: integers and constants have none, and a zero
        # made real would be carried through the whole backward pass.
        moving = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
        results, out_tangents = jvp(fun, primals, moving, [tangents[n] for n in moving], **params)
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        is_zero = lambda t: getattr(t, "dtype", None) == jax.dtypes.float0
        return results, [
            zero(x) if is_zero(t) else t for x, t in zip(results, out_tangents, strict=True)
        ]

    ad.primitive_jvps[primitive] = jvp_rule
    return primitive


def jvp_of_moving(fun: Callable, primals, moving, tangents, **params):
    """Differentiates `fun` in the operands `moving` and returns (results, tangents)."""

    def of_moving(*arrays):
        operands = list(primals)
        for n, array in zip(moving, arrays, strict=True):
            operands[n] = array
        return fun(*operands, **params)

    return jax.jvp(of_moving, [primals[n] for n in moving], tangents)


def in_turn(primitive: core.Primitive, operands, dims, **params):
    """What a batching rule returns where what is mapped runs one after the other."""
    mapped = [n for n, dim in enumerate(dims) if dim is not None]
    if not mapped:
        results = primitive.bind(*operands, **params)
        return results, [None] * len(results)

    def one(parts):
        given = list(operands)
        for n, part in zip(mapped, parts, strict=True):
            given[n] = part
        return primitive.bind(*given, **params)

    results = jax.lax.map(one, [jnp.moveaxis(operands[n], dims[n], 0) for n in mapped])
    return results, [0] * len(results)


def in_front(primitive: core.Primitive, axis, operands, dims, **params):
    """What a batching rule returns where mapped axes come first in all operands and results."""
    if all(dim is None for dim in dims):
        results = primitive.bind(*operands, **params)
        return results, [None] * len(results)
    front = [
        jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    ]
    results = primitive.bind(*front, **params)
    return results, [0] * len(results)
