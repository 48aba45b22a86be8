"""A program run from its jaxpr, with every instruction in the hands of another function.

What a program computes between two instructions runs as it is. The instructions, which are all that
connects tokens, are given one by one to a function that may change them and keep what it sees.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from kernels.tracing.loops import scan_parts
from transformer.memory import instruction
from transformer.memory.instruction import Operands, read_p, write_read_p
from transformer.memory.memory import Memory

INSTRUCTIONS = {write_read_p, read_p}


class Instruction(NamedTuple):
    """One instruction of one token.

    Attributes:
      block: the number of the block among those of the cache; where blocks are stacked, it is
        meant in the repeat `operands.layer`.
      read: which read of its block it is: 0 comes with writing it, from 1 the block is read again.
      memory: what writing and reading mean.
      operands: those of one token, as `Turn.write_read` hands them on.
      packed: as in `transformer.memory.instruction`.
    """

    block: int
    read: int
    memory: Memory
    operands: Operands
    packed: int | None

    @property
    def again(self) -> bool:
        """Whether it reads a block that the token has written already."""
        return self.read > 0

    def run(self) -> tuple[Any, Any]:
        """Runs it: -> (arrays, z); the arrays are None where nothing is written."""
        if self.again:
            return None, instruction.read(self.memory, self.operands, self.packed)
        return instruction.write_read(self.memory, self.operands, self.packed)


def interpret(f: Callable, take: Callable) -> Callable:
    """Makes a program whose instructions are run by `take`.

    Args:
      f: a program, (params, cache, token, i) -> (cache, logits).
      take: `take(instruction) -> (cell, arrays, z, record)`: the cell that was written, what
        `Instruction.run` returned, and a pytree to keep. Where a block is read again, the cell of
        the instruction is the one that was written.

    Returns:
      g(params, cache, token, i) -> ((cache, logits), records): a record for each instruction, in
      order. Those of a loop over layers are the records of one repeat, with a leading axis of
      repeats.
    """

    def g(params, cache, token, i):
        operands = params, cache, token, i
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*operands)
        walk = _Walk(take)
        results = walk.run(closed, jax.tree.leaves(operands))
        return jax.tree.unflatten(jax.tree.structure(shapes), results), walk.records

    return g


class _Walk:
    """One pass over a jaxpr, or over one within it.

    Attributes:
      reads: how often each block has been read; a block is written when it is first read.
      block_of: the number of the block that an array, by its id, holds after it was written. The
        arrays are kept alive by who runs the jaxpr.
      cells: of each block the cell that was written, for those who read it again.
      records: what `take` wants kept.
    """

    def __init__(self, take, reads=()):
        self.take, self.reads = take, list(reads)
        self.block_of, self.cells, self.records = {}, {}, []

    def run(self, closed: core.ClosedJaxpr, operands: list) -> list:
        """Runs a jaxpr on the values of its operands."""
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        known |= zip(jaxpr.invars, operands, strict=True)
        of = lambda x: x.val if isinstance(x, core.Literal) else known[x]
        for part in _parts(jaxpr):
            if isinstance(part, core.Jaxpr):
                run = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
                results = run(*map(of, part.invars))
                known |= zip(part.outvars, results, strict=True)
                continue
            rule = _RULES.get(part.primitive.name)
            if rule is None:
                raise NotImplementedError(
                    f"a block is written or read inside of {part.primitive.name}, into which trace "
                    "and intervene do not look; call write_read and read outside of it."
                )
            results = rule(self, part, [of(x) for x in part.invars])
            known |= zip(part.outvars, results, strict=True)
        return [of(x) for x in jaxpr.outvars]

    def within(self, closed, transform: Callable, operands: list) -> list:
        """Runs a jaxpr inside of a transformation, and keeps what it records."""
        inner = _Walk(self.take, self.reads)
        inner.cells = dict(self.cells)
        blocks = [self.block_of.get(id(x)) for x in operands]

        def function(*operands):
            inner._hold(blocks, operands)
            results = inner.run(closed, list(operands))
            blocks[:] = [inner.block_of.get(id(x)) for x in results]
            return results, inner.records, inner.cells

        results, records, self.cells = transform(function)(*operands)
        self._hold(blocks, results)
        self.reads, self.records = inner.reads, [*self.records, *records]
        return results

    def _hold(self, blocks, arrays):
        """Remembers which arrays are blocks that have been written."""
        pairs = zip(blocks, arrays, strict=True)
        self.block_of |= {id(x): block for block, x in pairs if block is not None}


def _parts(jaxpr) -> Iterator:
    """A jaxpr in pieces, in order: equations that are or hold instructions, and jaxprs without."""
    used = {x for eqn in jaxpr.eqns for x in eqn.invars if isinstance(x, core.Var)}
    used |= {x for x in jaxpr.outvars if isinstance(x, core.Var)}

    def together(eqns):
        made = [x for eqn in eqns for x in eqn.outvars if x in used]
        own = {x for eqn in eqns for x in eqn.outvars}
        needs = (x for eqn in eqns for x in eqn.invars if isinstance(x, core.Var))
        needs = [x for x in dict.fromkeys(needs) if x not in own]
        return jaxpr.replace(constvars=[], invars=needs, outvars=made, eqns=eqns)

    group = []
    for eqn in jaxpr.eqns:
        if not _instructs(eqn):
            group.append(eqn)
            continue
        if group:
            yield together(group)
        group = []
        yield eqn
    if group:
        yield together(group)


def _instructs(eqn):
    if eqn.primitive in INSTRUCTIONS:
        return True
    return any(_instructs(x) for closed in _jaxprs(eqn) for x in closed.jaxpr.eqns)


def _jaxprs(eqn):
    values = [x if isinstance(x, list | tuple) else [x] for x in eqn.params.values()]
    every = [x for group in values for x in group if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
    return [x if isinstance(x, core.ClosedJaxpr) else core.ClosedJaxpr(x, ()) for x in every]


# Rules: (walk, equation, values of its operands) -> values of its results.


def _instruction(walk, eqn, values):
    params = eqn.params
    if params["rows"] != 1 or params["batched"] or params["chunked"]:
        raise NotImplementedError(
            "the program maps its own instructions (jax.vmap inside of it); trace and intervene "
            "take programs in which an instruction is that of one token."
        )
    given = jax.tree.unflatten(params["tree"], values)
    one = lambda tree: jax.tree.map(lambda x: x[0, 0], tree)
    given = given._replace(i=one(given.i), cell=one(given.cell), query=one(given.query))
    if eqn.primitive is read_p:
        block = walk.block_of[id(jax.tree.leaves(given.arrays[1])[0])]
        given = given._replace(cell=walk.cells[block])
    else:
        block = len(walk.reads)
        walk.reads.append(0)
    own = Instruction(block, walk.reads[block], params["memory"], given, params["packed"])
    walk.reads[block] += 1
    walk.cells[block], arrays, z, record = walk.take(own)
    walk.records.append(record)
    z = [x[None, None] for x in jax.tree.leaves(z)]
    if own.again:
        return z
    arrays = jax.tree.leaves(arrays)
    walk._hold([block] * len(arrays), arrays)
    return [*arrays, *z]


def _call(walk, eqn, values):
    [closed] = _jaxprs(eqn)
    return walk.run(closed, values)


def _checkpoint(walk, eqn, values):
    [closed] = _jaxprs(eqn)
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return walk.within(closed, lambda inner: jax.checkpoint(inner, **options), values)


def _scan(walk, eqn, values):
    """A loop over layers: each repeat goes through all blocks."""
    params = eqn.params
    consts, carry, slices = scan_parts(eqn, values)

    def step(state, xs):
        inner = _Walk(walk.take)
        results = inner.run(params["jaxpr"], [*consts, *state, *xs])
        return results[: len(state)], (results[len(state) :], inner.records)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    state, (ys, records) = jax.lax.scan(step, carry, slices, **options)
    walk.records += records
    return [*state, *ys]


_RULES = {
    write_read_p.name: _instruction,
    read_p.name: _instruction,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
    "scan": _scan,
}
