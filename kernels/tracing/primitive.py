"""A JAX primitive whose batching rule is ours.

`jax.custom_batching.custom_vmap` cannot be differentiated in reverse, and `jax.custom_vjp` cannot
change what `vmap` means. A primitive can do both: it stands in the jaxpr under its own name, the
batching rule is ours, and differentiation goes through the function that defines it.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax._src import dispatch
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def define(name: str, fun: Callable, batch: Callable) -> core.Primitive:
    """Makes a primitive with several results out of a function of arrays.

    Args:
      name: the primitive's name, as it appears in jaxprs.
      fun: `fun(*arrays, **params) -> list of arrays`: its meaning. It is lowered, and
        differentiated, by tracing it.
      batch: `batch(axis_size, operands, dims, **params) -> (results, result_dims)`, where `dims`
        holds the mapped axis of each operand, or None where it is not mapped.

    Returns:
      The primitive; call it with `primitive.bind(*arrays, **params)`.
    """
    primitive = core.Primitive(name)
    primitive.multiple_results = True

    @primitive.def_impl
    def _(*operands, **params):
        return jax.jit(partial(fun, **params))(*operands)

    @primitive.def_abstract_eval
    def _(*avals, **params):
        return jax.make_jaxpr(partial(fun, **params))(*avals).out_avals

    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=True))
    # What is split over devices (kernels/tracing/partition.py) must know them when it is lowered;
    # JAX looks for that in the jaxpr, where the function is not seen.
    dispatch.prim_requires_devices_during_lowering.add(primitive)

    def batching_rule(operands, dims, **params):
        size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
        return batch(size, operands, dims, **params)

    batching.primitive_batchers[primitive] = batching_rule

    def jvp(primals, tangents, **params):
        # Only operands with a tangent take part: integers and constants have none, and a zero
        # made real would be carried through the whole backward pass.
        moving = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

        def of_moving(*arrays):
            operands = list(primals)
            for n, array in zip(moving, arrays, strict=True):
                operands[n] = array
            return fun(*operands, **params)

        return jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])

    ad.primitive_jvps[primitive] = jvp
    return primitive
