"""What can be proved of a program before anything runs."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from transformer.memory.cache import Cache, Turn
from transformer.memory.instruction import POSITIONS
from transformer.memory.rules import ProgramError, Rule
from transformer.modes.contract import source, state
from transformer.modes.contract.findings import Findings
from transformer.modes.contract.flow import BEFORE, OWN, Block, Flow, Scope, Value
from transformer.modes.contract.tracing import Hidden, Trace, difference, trace

TOKEN = jax.ShapeDtypeStruct((), jnp.int32)


def check(f: Callable, params, cache: Cache, vocab_size: int, findings: Findings):
    """Checks the rules of a program: -> (its trace, what it writes), as far as it got."""
    once, scope = None, Scope()
    with explained(f, findings):
        operands, tokens = (params, cache, TOKEN, TOKEN), min(2, cache.capacity)
        trace(f, operands, Hidden(tokens))  # what is remembered for ever is remembered now
        _check_kept(f, findings)
        if findings:
            return once, scope.written
        with jax.checking_leaks():  # wherever they are
            trace(f, operands, Hidden(tokens))
        hidden = Hidden(tokens)
        before = state.contents(state.held(f))
        once = trace(f, operands, hidden)
        _check_state(before, state.contents(state.held(f)), findings)
        if _check_results(f, once.results, cache, vocab_size, findings):
            _check_flow(f, params, cache, once, hidden, scope, findings)
        if not findings:
            _check_other_traces(f, operands, once, hidden, findings)
    return once, scope.written


@contextlib.contextmanager
def explained(f: Callable, findings: Findings):
    """Makes violations of the errors that a program raises."""
    try:
        yield
    except Exception as error:  # it is the user's code that runs
        where, name = source.of_error(error) or source.of_function(f), type(error).__name__
        if isinstance(error, ProgramError):
            findings.violation(error.rule, error.block, name, where, str(error))
        elif isinstance(error, jax.errors.UnexpectedTracerError) or "Leaked" in str(error):
            _check_kept(f, findings)
            why = "values of one token's run are kept where the next can find them"
            findings.violation(Rule.STATE, None, name, where, f"{why}: {_first_line(error)}")
        else:
            why = f"the program does not run on one token: {_first_line(error)}"
            findings.violation(Rule.RUNS, None, name, where, why)


def _check_kept(f, findings):
    """Nothing that the code can reach holds a value of a trace that is over."""
    for at in state.tracers(state.held(f)):
        why = (
            f"{at.name} keeps a value that one token has computed, where the next can find it. "
            "Only the cache connects tokens."
        )
        findings.violation(Rule.STATE, None, "closure", at.where, why)


def _check_state(before, after, findings):
    """Nothing that the code can reach changes while it is traced."""
    for name in before.keys() & after.keys():
        at, content = after[name]
        if before[name][1] != content:
            why = (
                f"{name} changes whenever the program is traced; what one token leaves there "
                "another could find. Only the cache connects tokens."
            )
            findings.violation(Rule.STATE, None, "closure", at.where, why)


def _check_results(f, results, cache, vocab_size, findings):
    """The program returns a cache like the one it got, and logits [V]."""
    where = source.of_function(f)
    refuse = lambda why, rule=Rule.RUNS: findings.violation(rule, None, "return", where, why)
    if not isinstance(results, tuple) or len(results) != 2:
        refuse(f"the program returns {type(results).__name__}, and not a pair (cache, logits).")
        return False
    after, logits = results
    if isinstance(after, Turn):
        why = f"the program returns a turn at block {after.next}; return turn.end(), the cache."
        refuse(why, Rule.ONCE)
        return False
    if jax.tree.structure(after) != jax.tree.structure(cache):
        why = "what the program returns as its cache is not built as the cache that it was given"
        refuse(f"{why}; return turn.end().", Rule.PRIVATE)
        return False
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", None)
    if shape != (vocab_size,) or not jnp.issubdtype(dtype, jnp.floating):
        refuse(f"the logits are {logits}; they are floating-point numbers [V], V = {vocab_size}.")
    return True


def _check_flow(f, params, cache, once: Trace, hidden, scope, findings):
    """Follows the blocks and the position from the operands to the results."""
    blocks = [len(jax.tree.leaves(block)) for block in cache._blocks]
    held = state.caches(state.held(f))
    flow = Flow(
        blocks=blocks,
        repeats=cache.repeats,
        is_captured=_Within([cache, *(at.value for at in held)]),
        hidden=hidden,
        report=findings.violation,
        note=findings.note,
        where=source.of_function(f),
    )
    arrays = [Block(n, leaf, BEFORE) for n, count in enumerate(blocks) for leaf in range(count)]
    values = [
        *(Value(("parameter", n)) for n, _ in enumerate(jax.tree.leaves(params))),
        *map(Value, arrays),
        Value("the token", varies=True),
        Value(OWN, varies=True),
    ]
    results = flow.run(once.jaxpr, values, scope)
    flow.finish(results[: len(arrays)], results[len(arrays) :], scope)


def _check_other_traces(f, operands, once, hidden, findings):
    """The program is the same however often and in which mode it is traced."""
    many = lambda f: jax.vmap(f, (None, None, 0, 0), (None, 0), axis_name=POSITIONS)
    params, cache, *_ = operands
    tokens = jax.ShapeDtypeStruct((hidden.tokens,), jnp.int32)
    mapped = params, cache, tokens, tokens
    tree = jax.tree.structure(once.results)
    run = core.jaxpr_as_fun(once.jaxpr)
    as_traced = lambda *operands: jax.tree.unflatten(tree, run(*jax.tree.leaves(operands)))
    for one, make, rule, why in (
        (
            once,
            lambda: trace(f, operands, Hidden(hidden.tokens)),
            Rule.STATE,
            "the program is another one when it is traced again: it depends on something outside "
            "that changes",
        ),
        (
            once,
            lambda: trace(f, operands, hidden, positions=3),
            Rule.APART,
            "what the program computes depends on how many tokens run at once",
        ),
        (
            once,
            lambda: trace(f, operands, hidden, positions=None),
            Rule.APART,
            f'the program is another one where no axis "{POSITIONS}" is mapped',
        ),
        (
            trace(many(f), mapped, hidden, positions=None),
            lambda: trace(many(as_traced), mapped, hidden, positions=None),
            Rule.APART,
            f'the program is another one when it is mapped over "{POSITIONS}"',
        ),
    ):
        if eqn := difference(one, make()):
            where = source.of_equation(eqn) or source.of_function(f)
            findings.violation(rule, None, eqn.primitive.name, where, f"{why}.")
            return


class _Within:
    """Whether an array shares its memory with a cache."""

    def __init__(self, caches):
        leaves = [x for x in jax.tree.leaves(caches) if isinstance(x, jax.Array | np.ndarray)]
        self.ids = {id(x) for x in leaves}
        self.ranges = [(a, a + x.nbytes) for x in leaves if (a := _address(x)) is not None]
        self.leaves = leaves  # alive, so that no other array gets their place

    def __call__(self, x) -> bool:
        at = _address(x)
        inside = at is not None and any(begin <= at < end for begin, end in self.ranges)
        return id(x) in self.ids or inside


def _address(x):
    """Where an array lies in memory, or None where it is empty, or not in one place."""
    if isinstance(x, np.ndarray):
        return x.ctypes.data if x.size else None
    with contextlib.suppress(Exception):  # tracers, and arrays on several devices
        return x.unsafe_buffer_pointer() if x.size else None
    return None


def _first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
