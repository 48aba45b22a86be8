"""The same program with memories that go token by token, which is what all memories mean."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.extend import core

from transformer.memory.memory import Memory
from transformer.modes.contract.tracing import INSTRUCTIONS


@dataclass(frozen=True)
class ByStep(Memory):
    """A memory by the `step` of another one, and by nothing else of it."""

    memory: Memory

    def empty(self, capacity, cell):
        """As of the memory."""
        return self.memory.empty(capacity, cell)

    def step(self, block, i, cell, query, shared):
        """As of the memory."""
        return self.memory.step(block, i, cell, query, shared)


def by_step(closed: core.ClosedJaxpr, results) -> Callable:
    """The program of a jaxpr, each memory run by its `step`.

    Args:
      closed: the jaxpr of a program.
      results: what the program returns, as shapes.
    """
    run, tree = core.jaxpr_as_fun(_replaced(closed)), jax.tree.structure(results)
    return lambda *operands: jax.tree.unflatten(tree, run(*jax.tree.leaves(operands)))


def _replaced(x):
    """A parameter of an equation, or a jaxpr, in which every memory is replaced."""
    if isinstance(x, core.Jaxpr):  # from JAX 0.11 on a closed one too
        return x.replace(eqns=list(map(_equation, x.eqns)))
    if isinstance(x, core.ClosedJaxpr):
        return x.replace(jaxpr=_replaced(x.jaxpr))
    if type(x) in (list, tuple):
        return type(x)(map(_replaced, x))
    return x


def _equation(eqn):
    if eqn.primitive in INSTRUCTIONS:
        return eqn.replace(params=eqn.params | {"memory": ByStep(eqn.params["memory"])})
    return eqn.replace(params={key: _replaced(x) for key, x in eqn.params.items()})
