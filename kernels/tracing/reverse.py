"""Functions with first derivatives in reverse mode only, which refuse any other with a sentence.

Left to itself, JAX would complain about the `custom_vjp` or the kernel that it met inside.
"""

from collections.abc import Callable

import jax

from kernels.tracing.linear import linear_call
from kernels.tracing.partition import vary_like


class NoSuchDerivative(NotImplementedError):
    """A function was differentiated in forward mode, or twice."""


def reverse_only(fun: Callable, message: str) -> Callable:
    """Makes `fun(moving, fixed)` refuse all derivatives except a first one in reverse mode.

    JAX takes the same first step in both modes, and only later does it show which one is meant: in
    reverse mode the tangents are transposed away, so that they are never computed.

    Args:
      fun: a function of two pytrees of arrays, which has gradients for the first.
      message: the text of the error.

    Returns:
      The function. It raises NoSuchDerivative when a tangent is evaluated or, under jit, when it is
      lowered, if not before.
    """
    forward = _undifferentiated(
        lambda moving, fixed: jax.vjp(lambda moving: fun(moving, fixed), moving), message
    )
    backward = _undifferentiated(lambda pull, cotangents: pull(cotangents)[0], message)

    def refuse(*_):
        raise NoSuchDerivative(message)

    run = jax.custom_jvp(fun)

    @run.defjvp
    def _(primals, tangents):
        # Inside `shard_map` the gradients are those of one device, which `linear_call` sums.
        results, pull = forward(*vary_like(primals, primals))
        return results, linear_call(refuse, backward, pull, tangents[0], results)

    return run


def _undifferentiated(fun, message):
    fun = jax.custom_jvp(fun)

    @fun.defjvp
    def _(*_):
        raise NoSuchDerivative(message)

    return fun
