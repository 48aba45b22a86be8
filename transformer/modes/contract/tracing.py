"""Traces of a program, and where two of them differ."""

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kernels.delta_rule import delta_rule_p
from kernels.dot import dot_p
from kernels.exact.total import powers_p, total_p
from kernels.ragged_dot import ragged_dot_p
from kernels.tracing.linear import linear_call_p
from transformer.memory.instruction import POSITIONS, Operands, read_p, write_read_p
from transformer.numerics.layouts import dot_by_output_p, dot_packed_p
from transformer.numerics.products import exact_dot_p
from transformer.numerics.quantised import quantised_dot_p
from transformer.program.experts import experts_p

INSTRUCTIONS = {write_read_p, read_p}
# Other primitives of ours; they compute each token by itself, as tests of theirs show.
OURS = {
    dot_by_output_p,
    dot_p,
    dot_packed_p,
    exact_dot_p,
    experts_p,
    linear_call_p,
    powers_p,
    quantised_dot_p,
    total_p,
}
KERNELS = {delta_rule_p, ragged_dot_p}  # such, too, but there is nothing to look into


class Hidden:
    """The jaxprs of what primitives of ours run, which are no part of their equations.

    Those of an instruction are what its memory runs for one token and for two at once; none where
    the memory is ours too. What has been traced once is not traced again.

    Attributes:
      tokens: how many tokens run at once: two, or one where the cache has no more room.
    """

    def __init__(self, tokens: int = 2):
        self.tokens = tokens
        self._known = {}

    def __call__(self, eqn) -> list[core.ClosedJaxpr]:
        """The jaxprs of what one equation runs."""
        foreign = eqn.primitive in INSTRUCTIONS and not _is_ours(eqn.params["memory"])
        if eqn.primitive not in OURS and not foreign:
            return []
        kinds = tuple(str(x.aval) for x in eqn.invars)
        key = eqn.primitive, tuple(eqn.params.items()), kinds
        if key not in self._known:
            self._known[key] = _of_memory(eqn, self.tokens) if foreign else [_run(eqn)]
        return self._known[key]


class Trace(NamedTuple):
    """What a program was traced to.

    Attributes:
      jaxpr: the `ClosedJaxpr`, of the leaves of (params, cache, token, i).
      results: what the program returned, as shapes.
      lines: every equation in a form that can be compared, and the equation.
    """

    jaxpr: core.ClosedJaxpr
    results: Any
    lines: list


def trace(f: Callable, operands, hidden: Hidden, positions: int | None = 2) -> Trace:
    """Traces a function anew.

    Args:
      f: what is traced.
      operands: its operands, arrays or shapes.
      hidden: what has been traced of the primitives within.
      positions: the size of an axis of positions around it; None: there is none.
    """
    axes = [] if positions is None else [(POSITIONS, positions)]
    anew = lambda *operands: f(*operands)  # what JAX has traced before, it does not run again
    jaxpr, results = jax.make_jaxpr(anew, axis_env=axes, return_shape=True)(*operands)
    return Trace(jaxpr, results, list(_lines(jaxpr, hidden)))


def make_jaxpr(f: Callable, operands) -> core.ClosedJaxpr:
    """The jaxpr of a function of arrays, traced anew on an axis of two positions."""
    anew = lambda *operands: f(*operands)  # what JAX has traced before, it does not run again
    return jax.make_jaxpr(anew, axis_env=[(POSITIONS, 2)])(*operands)


def shapes(variables) -> list[jax.ShapeDtypeStruct]:
    """The shapes of some variables of a jaxpr."""
    return [_struct(x.aval.shape, x.aval) for x in variables]


def jaxprs(eqn) -> list[core.ClosedJaxpr]:
    """The jaxprs within an equation."""
    values = [x if isinstance(x, list | tuple) else [x] for x in eqn.params.values()]
    every = [x for group in values for x in group if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
    return [x if isinstance(x, core.ClosedJaxpr) else core.ClosedJaxpr(x, ()) for x in every]


def equations(closed: core.ClosedJaxpr) -> Iterator:
    """All equations of a jaxpr and of those within it."""
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for inner in jaxprs(eqn):
            yield from equations(inner)


def difference(a: Trace, b: Trace):
    """The first equation of `a` that `b` has not got in its place; None: they are the same."""
    for (line, eqn), (other, _) in zip(a.lines, b.lines, strict=False):
        if line != other:
            return eqn
    return None if len(a.lines) == len(b.lines) else a.lines[-1][1]


def _lines(closed, hidden):
    """Each equation as a line, without what differs from trace to trace: names and addresses."""
    jaxpr, names = closed.jaxpr, {}
    names.update(zip(jaxpr.constvars, map(_digest, closed.consts), strict=True))
    names.update((x, n) for n, x in enumerate(jaxpr.invars))
    name = lambda x: str(x) if isinstance(x, core.Literal) else names[x]
    for eqn in jaxpr.eqns:
        operands = tuple(map(name, eqn.invars))
        names.update((x, len(names) + n) for n, x in enumerate(eqn.outvars))
        kinds = tuple(str(x.aval) for x in eqn.outvars)
        params = {key: _said(x) for key, x in eqn.params.items() if not _holds_jaxprs(x)}
        yield (eqn.primitive.name, operands, kinds, params), eqn
        for inner in [*jaxprs(eqn), *hidden(eqn)]:
            yield from _lines(inner, hidden)
    if jaxpr.eqns:
        yield tuple(map(name, jaxpr.outvars)), jaxpr.eqns[-1]


def _holds_jaxprs(x):
    group = x if isinstance(x, list | tuple) else [x]
    return any(isinstance(y, core.Jaxpr | core.ClosedJaxpr) for y in group)


def _said(x):
    return re.sub(r"0x[0-9a-f]+", "", str(x))


def _digest(x):
    kind = jax.typeof(x)
    if hasattr(kind, "inner_aval") or jnp.issubdtype(kind.dtype, jax.dtypes.extended):
        return str(kind)
    return str(kind), hashlib.sha1(np.asarray(x).tobytes()).hexdigest()


def _is_ours(memory):
    """Whether a memory runs nothing but code of this package, which tests hold to the law."""
    kind = type(memory)
    module = sys.modules.get(kind.__module__)
    ours = kind.__module__.startswith("transformer.") and vars(module).get(kind.__name__) is kind
    return ours and not any(callable(x) for x in vars(memory).values())


def _of_memory(eqn, tokens):
    """The jaxprs of what the memory of an instruction runs."""
    given = jax.tree.unflatten(eqn.params["tree"], shapes(eqn.invars))
    if eqn.params["chunked"]:
        return [_run(eqn)]
    # As its author wrote them, for one sequence; then as the instruction runs them, mapped.
    memory, leading = eqn.params["memory"], (given.layer is not None) + eqn.params["batched"]
    arrays = given.arrays if eqn.primitive is write_read_p else given.arrays[0]
    cut = lambda tree, count: jax.tree.map(lambda x: _struct(x.shape[count:], x), tree)
    token = cut(given.i, 2), cut(given.cell, 2), cut(given.query, 2)
    chunk = jax.tree.map(lambda x: _struct((tokens, *x.shape), x), token)
    block = cut(arrays, leading)
    return [
        make_jaxpr(memory.step, (block, *token, given.shared)),
        make_jaxpr(memory.chunk, (block, *chunk, given.shared)),
        _run(eqn),
        _run(_mapped(eqn, given, tokens)),
    ]


def _run(eqn):
    """The jaxpr of what a primitive of ours runs."""
    return make_jaxpr(partial(eqn.primitive.impl, **eqn.params), shapes(eqn.invars))


def _mapped(eqn, given, tokens):
    """The equation of an instruction, mapped over some positions."""
    many = lambda tree: jax.tree.map(lambda x: _struct((tokens, *x.shape), x), tree)
    given = given._replace(i=many(given.i), cell=many(given.cell), query=many(given.query))
    bind = lambda given: eqn.primitive.bind(*jax.tree.leaves(given), **eqn.params)
    axes = Operands(None, None, 0, 0, 0, None)
    made = jax.make_jaxpr(jax.vmap(bind, (axes,), axis_name=POSITIONS))(given)
    return next(x for x in made.jaxpr.eqns if x.primitive is eqn.primitive)


def _struct(shape, like):
    return jax.ShapeDtypeStruct(shape, like.dtype)
