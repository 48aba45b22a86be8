"""Where the arrays of blocks and the token's position go, through all equations of a jaxpr.

Every value carries what it is exactly (its origin) and whether it differs from token to token. The
arrays of blocks may go into `write_read` and `read`, through calls, and back into the cache.
Anything else that takes one is a violation, so that nothing needs to be known about what comes out.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from kernels.tracing.loops import scan_parts
from transformer.memory.instruction import POSITIONS, Operands, read_p, write_read_p
from transformer.memory.memory import Memory
from transformer.memory.rules import Rule
from transformer.modes.contract import operations, source
from transformer.modes.contract.tracing import (
    INSTRUCTIONS,
    Hidden,
    equations,
    jaxprs,
    make_jaxpr,
    shapes,
)

OWN = "the token's own position"
COUNTER, REPEATS = "the layer of this repeat", "the numbers of all repeats"
CAPTURED = "an array of a cache outside"
REFERENCE = "a mutable array outside"
BEFORE, AFTER, OUTSIDE = "before", "after", "outside"

# Calls: the operands and results of the jaxpr within are those of the equation.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_SAME_NUMBERS = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p"}
_SMALL = 16  # elements of a constant that is known by its value


class Block(NamedTuple):
    """An array of a block: as it came (BEFORE), as `write_read` left it (AFTER), or, in the body
    of a loop over layers, by another way than the loop's state (OUTSIDE)."""

    number: int
    leaf: int
    when: str


@dataclass(frozen=True)
class Value:
    """What is known of a value.

    origin: what it is; values of the same origin are the same numbers, perhaps in another shape.
    varies: whether it may differ between the tokens of a sequence.
    """

    origin: Hashable
    varies: bool = False

    @property
    def block(self) -> Block | None:
        """The array of a block that it is."""
        return self.origin if isinstance(self.origin, Block) else None


class Written(NamedTuple):
    """A block that has been written: by which memory, and what."""

    memory: Memory
    cell: list[Value]
    shapes: Any  # of one cell


@dataclass
class Scope:
    """What one pass over all blocks has done so far: the token's, or that of a repeat of layers."""

    written: dict[int, Written] = field(default_factory=dict)
    layer: str | None = None

    def copy(self) -> "Scope":
        """The same, to be changed by itself."""
        return replace(self, written=dict(self.written))


@dataclass
class Flow:
    """A walk through the jaxpr of a program.

    Attributes:
      blocks: how many arrays each block of the cache has.
      repeats: of the cache.
      is_captured: whether a constant array is one of a cache, which is not the program's to know.
      hidden: what primitives of ours run.
      report: called with (rule, block, operation, where, why) for each violation.
      note: called with what is worth knowing.
      where: what cannot be found in the user's code is said to be here.
    """

    blocks: list[int]
    repeats: int | None
    is_captured: Callable
    hidden: Hidden
    report: Callable
    note: Callable
    where: str
    _outer: list = field(default_factory=list)
    _muted: int = 0
    _count: Iterator[int] = field(default_factory=itertools.count)

    def run(self, closed, values, scope: Scope) -> list[Value]:
        """Follows values through a jaxpr; returns those that it results in."""
        jaxpr, known = closed.jaxpr, {}

        def value(x):
            return constant(x.val) if isinstance(x, core.Literal) else known[x]

        known.update(zip(jaxpr.constvars, map(self._constant, closed.consts), strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [value(x) for x in eqn.invars], scope)
            known.update(zip(eqn.outvars, results, strict=True))
        return [value(x) for x in jaxpr.outvars]

    def finish(self, arrays: list[Value], logits: list[Value], scope: Scope) -> None:
        """Checks what the program returns: the arrays of its cache, and its logits."""
        wanted = [
            Block(n, leaf, AFTER) for n, count in enumerate(self.blocks) for leaf in range(count)
        ]
        missing = sorted(set(range(len(self.blocks))) - set(scope.written))
        for number in missing:
            why = f"block {number} is not written; each token writes each block exactly once."
            self.report(Rule.ONCE, number, "return", self.where, why)
        other = {block.number for x, block in zip(arrays, wanted, strict=True) if x.origin != block}
        for number in sorted(other - set(missing)):
            why = (
                f"as block {number} the program returns something else than write_read has made of "
                "it; return turn.end()."
            )
            self.report(Rule.PRIVATE, number, "return", self.where, why)
        for number in sorted({x.block.number for x in logits if x.block}):
            why = f"the program returns an array of block {number} as logits."
            self.report(Rule.PRIVATE, number, "return", self.where, why)

    def _constant(self, x):
        kind = jax.typeof(x)
        if self.is_captured(x):
            return Value(CAPTURED)
        if hasattr(kind, "inner_aval"):
            return Value(REFERENCE)
        if kind.shape == (self.repeats,) and jnp.issubdtype(kind.dtype, jnp.integer):
            return (
                Value(REPEATS) if (np.asarray(x) == np.arange(self.repeats)).all() else self._new()
            )
        return constant(x)

    def _new(self, varies=False):
        """A value of which nothing else is known."""
        return Value(next(self._count), varies)

    def _equation(self, eqn, values, scope):
        name, varies = eqn.primitive.name, any(x.varies for x in values)
        for rule, why in operations.broken_rules(eqn, varies):
            self._violation(eqn, rule, why)
        if operations.prints(eqn):
            self.note(f"{self._place(eqn)} prints; nothing comes back from it.")
        self._check_outside(eqn, values)
        self._look_into(eqn, self.hidden(eqn), varies=True)
        if eqn.primitive is write_read_p:
            return self._write_read(eqn, values, scope)
        if eqn.primitive is read_p:
            return self._read(eqn, values, scope)
        if name in _CALLS or name in _CUSTOM:
            return self._call(eqn, values, scope)
        if name == "scan":
            return self._scan(eqn, values, scope)
        if name == "while":
            return self._while(eqn, values, scope)
        if name == "cond":
            return self._cond(eqn, values, scope)
        self._no_blocks(eqn, values)
        self._look_into(eqn, jaxprs(eqn), varies)
        if name == "iota" and eqn.params["shape"] == (self.repeats,):
            return [Value(REPEATS)]
        if len(values) == len(eqn.outvars) == 1 and _keeps(eqn, values[0]):
            return values
        # What a mutable array gives back depends on more than the operands of that one operation.
        varies = varies or bool(eqn.effects)
        return [self._new(varies) for _ in eqn.outvars]

    def _check_outside(self, eqn, values):
        for x in values:
            if x.origin == CAPTURED and not jaxprs(eqn):
                why = (
                    f"{eqn.primitive.name} takes an array of a cache that the program closes over. "
                    "A program gets its cache as an argument, and touches it only by a turn."
                )
                self._violation(eqn, Rule.PRIVATE, why)
            if x.origin == REFERENCE and not jaxprs(eqn):
                why = (
                    f"{eqn.primitive.name} uses a mutable array that outlives the token, so tokens "
                    "reach each other by it. Only the cache connects tokens."
                )
                self._violation(eqn, Rule.STATE, why)

    def _no_blocks(self, eqn, values):
        for number in sorted({x.block.number for x in values if x.block}):
            why = (
                f"an array of block {number} goes into {eqn.primitive.name}. When all tokens run "
                "at once it holds other tokens' cells, later ones too; only turn.write_read and "
                "turn.read may touch it."
            )
            self._violation(eqn, Rule.PRIVATE, why, number)

    def _look_into(self, eqn, inner, varies):
        """Looks into jaxprs whose operands are not known one by one."""
        for closed in inner:
            with _Within(self, eqn):
                self.run(closed, [self._new(varies) for _ in closed.in_avals], Scope())

    # The instruction.

    def _write_read(self, eqn, values, scope):
        given = self._operands(eqn, values, scope)
        arrays = jax.tree.leaves(given.arrays)
        number = self._which(arrays, BEFORE, len(scope.written))
        if number is None:
            self._refuse_write(eqn, arrays, len(scope.written))
        elif number in scope.written:
            why = (
                f"block {number} is written a second time by the same token. Each token writes "
                "each block once; what it has written it may read again by turn.read."
            )
            self._violation(eqn, Rule.ONCE, why, number)
        elif number != len(scope.written):
            why = (
                f"block {number} is written when it is the turn of block {len(scope.written)}; "
                "the blocks are written in order."
            )
            self._violation(eqn, Rule.ONCE, why, number)
        count = len(arrays)
        z = [self._new(varies=True) for _ in eqn.outvars[count:]]
        if number is None:
            return [self._new(varies=True) for _ in arrays] + z
        shapes = jax.tree.unflatten(eqn.params["tree"], [x.aval for x in eqn.invars]).cell
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), shapes)
        cell = jax.tree.leaves(given.cell)
        scope.written[number] = Written(eqn.params["memory"], cell, one)
        return [Value(Block(number, n, AFTER)) for n in range(count)] + z

    def _refuse_write(self, eqn, arrays, expected):
        again = {x.block.number for x in arrays if x.block and x.block.when == AFTER}
        for number in again:
            why = (
                f"block {number} is written a second time by the same token. Each token writes "
                "each block once; what it has written it may read again by turn.read."
            )
            self._violation(eqn, Rule.ONCE, why, number)
        if not again:
            why = (
                f"what is written here is not block {expected} of the cache as it came, but "
                "something else: a computed array, a cache from elsewhere, or a part of a block."
            )
            self._violation(eqn, Rule.PRIVATE, why, expected)

    def _read(self, eqn, values, scope):
        given = self._operands(eqn, values, scope)
        before, after = map(jax.tree.leaves, given.arrays)
        number = self._which(before, BEFORE, None)
        if number is None or self._which(after, AFTER, number) != number:
            why = (
                "what is read here is not a block that this token has written. An earlier token's "
                "cell of a block that is yet to be written is not there when all tokens run at "
                "once."
            )
            self._violation(eqn, Rule.WRITTEN, why, number)
        elif jax.tree.leaves(given.cell) != scope.written[number].cell:
            why = f"block {number} is read with another cell than this token has written into it."
            self._violation(eqn, Rule.WRITTEN, why, number)
        return [self._new(varies=True) for _ in eqn.outvars]

    def _operands(self, eqn, values, scope) -> Operands:
        """The operands of an instruction, after what both instructions want of them."""
        given = jax.tree.unflatten(eqn.params["tree"], values)
        number = next((x.block.number for x in jax.tree.leaves(given.arrays) if x.block), None)
        if eqn.params["chunked"] or eqn.params["packed"] is not None:
            why = (
                "the instruction is not that of one token; call turn.write_read on the cache that "
                f'is given, and give axes that a program maps other names than "{POSITIONS}".'
            )
            self._violation(eqn, Rule.PROVABLE, why, number)
        if given.i.origin != OWN:
            why = (
                "the position of this turn is not the token's own i, or cannot be shown to be: it "
                "must be the i that the program was given, unchanged. A token that writes another "
                "cell would overwrite, or see, what is not its own."
            )
            self._violation(eqn, Rule.OWN, why, number)
        if (given.layer.origin if given.layer else None) != scope.layer:
            why = (
                "the layer of a stack of blocks is not that of a loop over all of them; use "
                "turn.scan."
            )
            self._violation(eqn, Rule.ONCE, why, number)
        if any(x.varies for x in jax.tree.leaves(given.shared)):
            why = (
                "`shared` differs from token to token; it is what all tokens have in common. Put "
                "what depends on the token into the query."
            )
            self._violation(eqn, Rule.APART, why, number)
        self._no_blocks(eqn, jax.tree.leaves((given.i, given.cell, given.query, given.shared)))
        return given

    def _which(self, arrays, when, expected):
        """The number of the block whose arrays these are, all in order; None: of none."""
        if not arrays:  # a block without arrays
            empty = expected is not None and expected < len(self.blocks)
            return expected if empty and not self.blocks[expected] else None
        first = arrays[0].block
        if first is None or self.blocks[first.number] != len(arrays):
            return None
        wanted = [Block(first.number, n, when) for n in range(len(arrays))]
        return first.number if [x.origin for x in arrays] == wanted else None

    # Calls and loops.

    def _call(self, eqn, values, scope):
        [inner, *_] = jaxprs(eqn)
        if eqn.primitive.name in _CUSTOM:
            if any(x.block for x in values) or _instructs(inner):
                why = (
                    f"a block goes into a {eqn.primitive.name}, whose own rule of differentiation "
                    "takes the place of its function in training. Call the instruction outside."
                )
                self._violation(eqn, Rule.PROVABLE, why)
            self._look_into_derivative(eqn)
        with _Within(self, eqn):
            return self.run(inner, values, scope)

    def _look_into_derivative(self, eqn):
        """Looks into the rule of differentiation that runs in training."""
        if self._muted:
            return
        try:
            closed = gradient(eqn)
        except Exception as error:  # it is the user's code that runs
            self.note(f"{self._place(eqn)} has no gradient: {error}")
            return
        with _Within(self, eqn):
            for inner in equations(closed):
                for rule, why in operations.broken_rules(inner, varies=True):
                    self._violation(inner, rule, f"{why} It is in a rule of differentiation.")

    def _scan(self, eqn, values, scope):
        body, parts = eqn.params["jaxpr"], scan_parts(eqn, values)
        if _instructs(body, write_read_p):
            return self._layers(eqn, body, *parts, scope)
        self._no_blocks(eqn, parts[2])
        xs = [self._new(x.varies) for x in parts[2]]
        step = lambda carry: self.run(body, [*parts[0], *carry, *xs], scope.copy())
        return self._fixed(eqn, step, parts[1])

    def _fixed(self, eqn, step, carry):
        """What comes out of a loop; `step` is a run of its body from its state."""
        count, begin, changing = len(carry), list(carry), [self._new() for _ in carry]
        with _Within(self, eqn):
            while True:
                self._muted += 1
                after = step(carry)[:count]
                self._muted -= 1
                joined = list(map(_joined, carry, after, changing))
                if joined == carry:
                    break
                carry = joined
            results = step(carry)
        lost = [x for x, y in zip(begin, carry, strict=True) if x.block and not y.block]
        self._no_blocks(eqn, [*lost, *results[count:]])
        return [*carry, *(self._new(x.varies) for x in results[count:])]

    def _layers(self, eqn, body, consts, carry, xs, scope):
        """A loop over layers: each repeat writes its layer of each block."""
        whole = eqn.params["length"] == self.repeats and not eqn.params["reverse"]
        if not whole or scope.layer or scope.written:
            why = (
                "a loop writes blocks, and it does not run once over all repeats of a stack of "
                "blocks, in order and from block 0. Use turn.scan on a cache of stacked blocks, or "
                "give each step of the loop a block of its own."
            )
            self._violation(eqn, Rule.ONCE, why)
        self._no_blocks(eqn, xs)
        outside = lambda x: Value(x.block._replace(when=OUTSIDE)) if x.block else x
        inner = Scope(layer=COUNTER)
        consts = [outside(x) for x in consts]
        xs = [Value(COUNTER) if x.origin == REPEATS else self._new(x.varies) for x in xs]
        # A block that the next repeat finds is the one that this repeat has written.
        carried = {BEFORE: OUTSIDE, AFTER: BEFORE, OUTSIDE: OUTSIDE}

        def step(carry):
            inner.written.clear()
            results = self.run(body, [*consts, *carry, *xs], inner)
            return [
                Value(x.block._replace(when=carried[x.block.when])) if x.block else x
                for x in results
            ]

        results = self._fixed(eqn, step, carry)
        missing = set(range(len(self.blocks))) - set(inner.written)
        for number in sorted(missing):
            why = f"a repeat of the layers does not write block {number}."
            self._violation(eqn, Rule.ONCE, why, number)
        scope.written |= inner.written
        after = lambda x: Value(x.block._replace(when=AFTER)) if _is_before(x) else x
        return [after(x) for x in results]

    def _while(self, eqn, values, scope):
        conditions, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        until, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        if _instructs(body, write_read_p) or _instructs(until, write_read_p):
            why = (
                "a block is written in a loop that runs as often as its condition holds; each "
                "token writes each block exactly once."
            )
            self._violation(eqn, Rule.ONCE, why)
        of_condition, of_body = values[:conditions], values[conditions : conditions + bodies]
        step = lambda carry: self.run(body, [*of_body, *carry], scope.copy())
        carry = self._fixed(eqn, step, values[conditions + bodies :])
        with _Within(self, eqn):
            [goes_on] = self.run(until, [*of_condition, *carry], scope.copy())
        return self._varied(eqn, carry, goes_on.varies)

    def _cond(self, eqn, values, scope):
        index, operands = values[0], values[1:]
        self._no_blocks(eqn, [index])
        scopes = [scope.copy() for _ in eqn.params["branches"]]
        with _Within(self, eqn):
            every = [
                self.run(branch, operands, inner)
                for branch, inner in zip(eqn.params["branches"], scopes, strict=True)
            ]
        writes = any(inner.written.keys() != scope.written.keys() for inner in scopes)
        same = all(inner.written.keys() == scopes[0].written.keys() for inner in scopes)
        if writes and (index.varies or not same):
            why = (
                "whether and how a block is written is chosen by a condition; each token writes "
                "each block exactly once, whatever it computes."
            )
            self._violation(eqn, Rule.ONCE, why)
        scope.written = scopes[0].written
        results = []
        for options in zip(*every, strict=True):
            joined, differing = options[0], self._new()
            for other in options[1:]:
                joined = _joined(joined, other, differing)
            if not joined.block:
                self._no_blocks(eqn, options)
            results.append(joined)
        return self._varied(eqn, results, index.varies)

    def _varied(self, eqn, values, varies):
        """Values that were chosen by something that may vary."""
        if not varies:
            return values
        self._no_blocks(eqn, values)
        return [self._new(varies=True) for _ in values]

    # What is told.

    def _violation(self, eqn, rule, why, block=None):
        if not self._muted:
            self.report(rule, block, eqn.primitive.name, self._place(eqn), why)

    def _place(self, eqn):
        """The line of the user's code that an equation comes from."""
        path = [*self._outer, eqn]
        # A function of JAX's that was compiled keeps the lines of who called it first.
        stale = [n for n, outer in enumerate(self._outer) if _is_of_jax(outer)]
        for at in reversed(path[: stale[0] + 1] if stale else path):
            if where := source.of_equation(at):
                return where
        return self.where


class _Within:
    """While the walk is within the jaxpr of an equation."""

    def __init__(self, flow, eqn):
        self.flow, self.eqn = flow, eqn

    def __enter__(self):
        self.flow._outer.append(self.eqn)

    def __exit__(self, *_):
        self.flow._outer.pop()


def constant(x) -> Value:
    """A constant: two of them are the same where their numbers are."""
    kind = jax.typeof(x)
    small = not jnp.issubdtype(kind.dtype, jax.dtypes.extended) and kind.size <= _SMALL
    return Value((str(kind), np.asarray(x).tobytes() if small else id(x)))


def gradient(eqn) -> core.ClosedJaxpr:
    """The jaxpr of the reverse derivative of one equation."""
    operands = list(dict.fromkeys(x for x in eqn.invars if isinstance(x, core.Var)))
    [jaxpr, *_] = [closed.jaxpr for closed in jaxprs(eqn)]
    one = jaxpr.replace(constvars=[], invars=operands, outvars=list(eqn.outvars), eqns=[eqn])
    function = core.jaxpr_as_fun(core.ClosedJaxpr(one, ()))

    def pull(*operands):
        results, back = jax.vjp(function, *operands)
        return back([_cotangent(x) for x in results])

    return make_jaxpr(pull, shapes(operands))


def _cotangent(x):
    moves = jnp.issubdtype(x.dtype, jnp.inexact)
    return x if moves else np.zeros(x.shape, jax.dtypes.float0)


def _instructs(closed, *primitives):
    return any(eqn.primitive in (primitives or INSTRUCTIONS) for eqn in equations(closed))


def _joined(x, y, changing):
    """What a value is that may be x or y; `changing` where that is not known."""
    varies = x.varies or y.varies
    if x.origin == y.origin:
        return Value(x.origin, varies)
    if x.block and y.block and x.block[:2] == y.block[:2]:
        return Value(x.block._replace(when=OUTSIDE), varies)
    return Value(changing.origin, varies)


def _keeps(eqn, x):
    """Whether the one result of an equation has the numbers of its one operand, x."""
    if x.block or x.origin in (CAPTURED, REFERENCE):
        return False
    if eqn.primitive.name == "convert_element_type":
        new = np.dtype(eqn.params["new_dtype"])
        return x.origin in (OWN, COUNTER) and new.kind == "i" and new.itemsize >= 4
    return eqn.primitive.name in _SAME_NUMBERS


def _is_before(x):
    return x.block is not None and x.block.when == BEFORE


def _is_of_jax(eqn):
    """Whether an equation calls a function that JAX itself has compiled."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return False
    made = eqn.params["jaxpr"].jaxpr.debug_info.func_src_info or ""
    return source.is_installed(made.rpartition(" at ")[2])
