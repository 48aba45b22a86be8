"""How deep a program's computation is: the longest chain of instructions that wait for each other.

Every value of the program has a level: how many instructions it has to wait for. Levels are
computed from the jaxpr of one token, and go from token to token through the blocks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from kernels.tracing.loops import scan_parts
from transformer.checks import whole_number
from transformer.memory.instruction import read_p, write_read_p


def depth(f: Callable, params, cache, length: int) -> int:
    """Counts the longest chain of instructions that wait for each other when T tokens run.

    What runs side by side counts once, so this is what a mode costs on a machine that is wide
    enough, in instructions.

    - A lawful program has a depth of L, one for each block, whatever T: in the parallel mode all
      tokens write and read block 0, then all of them block 1, and so on. A block read again adds
      one where the program waits for it.
    - An instruction counts as its memory says (`Memory.depth`): attention as one, a `Fold` as
      log2(T), a memory that goes from token to token as T.
    - Where a cell depends on cells of the tokens before, which depend on those before them, there
      is no parallel mode, and the chain goes through all tokens: T x L in the feedback transformer
      (arXiv:2002.09402), whose first layer reads what the last one made of the token before.
    - A program may go around the instruction and compute with the arrays of the cache. What it
      computes from them counts one more than they do; so a recurrent network written by hand has a
      depth of T.

    An instruction counts where logits or cells wait for it. The cache may be any pytree and f any
    function of one token, lawful or not. Nothing is computed but shapes, so params and cache may
    also be pytrees of `jax.ShapeDtypeStruct`.

    Args:
      f: (params, cache, token, i) -> (cache, logits).
      params, cache: as for `run`. The capacity of the cache does not limit `length`.
      length: the number of tokens T, at least 1.

    Returns:
      The depth, at least 0.

    Raises:
      ValueError: length is below 1, f returns a cache of another structure than it got, or a
        `while` loop, which may run any number of times, has a depth that grows with each.
      TypeError: length is not a whole number.
      ProgramError: f breaks the rules of the turn while it is traced.
    """
    length = whole_number("length", length, least=1)
    token = jax.ShapeDtypeStruct((), "int32")
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(params, cache, token, token)
    if jax.tree.structure(shapes[0]) != jax.tree.structure(cache):
        raise ValueError(
            f"the program got a cache of structure {jax.tree.structure(cache)} and returned "
            f"{jax.tree.structure(shapes[0])}; it returns (cache, logits)."
        )
    count = len(jax.tree.leaves(cache))
    params = [_Level()] * len(jax.tree.leaves(params))

    def one_token(blocks, mode):
        """Levels of the blocks before a token -> those after it, and the highest of all results."""
        blocks = [replace(block, of_cache=True) for block in blocks]
        levels = _run(jaxpr.jaxpr, [*params, *blocks, _Level(), _Level()], mode)
        return levels[:count], max(level.last for level in levels)

    # All tokens at once: each of them finds the blocks at the levels at which it leaves them. Where
    # there are such levels, they settle within as many tokens as there are blocks.
    blocks = [_Level()] * count
    for _ in range(count + 1):
        before = blocks
        blocks, deepest = one_token(before, _Mode(length, at_once=True))
        if [block.steps for block in blocks] == [block.steps for block in before]:
            return deepest
    # One after the other: the levels grow from token to token.
    blocks = [_Level()] * count
    for _ in range(length):
        blocks, deepest = one_token(blocks, _Mode(length, at_once=False))
    return deepest


@dataclass(frozen=True)
class _Level:
    """How many instructions an array waits for.

    steps: the number; for a stack of blocks (`Turn.scan`) one for each repeat, once they differ.
    of_cache: whether it is an array of the cache, perhaps moved, cut, or with cells written.
    """

    steps: tuple[int, ...] = (0,)
    of_cache: bool = False

    @property
    def last(self) -> int:
        """That of the whole array."""
        return max(self.steps)

    def of(self, repeat: int | None) -> int:
        """That of one repeat's block in a stack; None: there is no stack."""
        return self.last if repeat is None or len(self.steps) == 1 else self.steps[repeat]

    def written(self, step: int, repeat: int | None, repeats: int) -> "_Level":
        """That of a block, or of a stack of `repeats` blocks, once one of them is written."""
        if repeat is None:
            return replace(self, steps=(max(step, self.last),))
        steps = [max(step, self.of(n)) if n == repeat else self.of(n) for n in range(repeats)]
        return replace(self, steps=tuple(steps))


@dataclass(frozen=True)
class _Mode:
    """How instructions count.

    length: the number of tokens. at_once: whether an instruction runs for all of them at once, or
    for one after the other.
    """

    length: int
    at_once: bool

    def steps(self, memory) -> int:
        """How many steps an instruction takes."""
        return memory.depth(self.length if self.at_once else 1)

    def chained(self, memory) -> bool:
        """Whether a token's block waits for that of the token before, not just for its cell."""
        return not self.at_once and memory.depth(self.length) > memory.depth(1)


def _run(jaxpr, levels, mode, repeat=None):
    """Levels of the operands of a jaxpr -> levels of its results; repeat: of `Turn.scan`."""
    known = dict.fromkeys(jaxpr.constvars, _Level()) | dict(zip(jaxpr.invars, levels, strict=True))
    of = lambda x: _Level() if isinstance(x, Literal) else known[x]
    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, _compute)
        results = rule(eqn, [of(x) for x in eqn.invars], mode, repeat)
        known |= zip(eqn.outvars, results, strict=True)
    return [of(x) for x in jaxpr.outvars]


def _write_read(eqn, levels, mode, repeat):
    given = jax.tree.unflatten(eqn.params["tree"], levels)
    memory, blocks = eqn.params["memory"], jax.tree.leaves(given.arrays)
    repeat = None if given.layer is None else repeat
    ready = max(block.of(repeat) for block in blocks)
    cell = _last(jax.tree.leaves((given.i, given.cell)))
    z = max(ready, cell, _last(jax.tree.leaves((given.query, given.shared)))) + mode.steps(memory)
    written = z if mode.chained(memory) else cell
    after = []
    for block, x in zip(blocks, eqn.invars[: len(blocks)], strict=True):
        repeats = 1 if repeat is None else x.aval.shape[eqn.params["batched"]]
        after.append(block.written(written, repeat, repeats))
    return [*after, *[_Level((z,))] * (len(eqn.outvars) - len(blocks))]


def _read(eqn, levels, mode, repeat):
    given = jax.tree.unflatten(eqn.params["tree"], levels)
    repeat = None if given.layer is None else repeat
    ready = max(level.of(repeat) for level in levels)
    return [_Level((ready + mode.steps(eqn.params["memory"]),))] * len(eqn.outvars)


def _scan(eqn, levels, mode, _):
    params = eqn.params
    consts, carry, xs = scan_parts(eqn, levels)
    ys = [_Level()] * (len(eqn.outvars) - len(carry))
    for n in range(params["length"]):
        repeat = params["length"] - 1 - n if params["reverse"] else n
        results = _run(params["jaxpr"].jaxpr, [*consts, *carry, *xs], mode, repeat)
        carry = results[: len(carry)]
        ys = [_later(*pair) for pair in zip(ys, results[len(carry) :], strict=True)]
    return [*carry, *ys]


def _while(eqn, levels, mode, repeat):
    params = eqn.params
    at = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = levels[: at[0]], levels[at[0] : at[1]], levels[at[1] :]
    for _ in range(len(carry) + 2):
        [again] = _run(params["cond_jaxpr"].jaxpr, [*cond_consts, *carry], mode, repeat)
        before = carry
        after = _run(params["body_jaxpr"].jaxpr, [*body_consts, *carry], mode, repeat)
        carry = [_later(_later(x, y), again) for x, y in zip(before, after, strict=True)]
        if carry == before:
            return carry
    raise ValueError(
        "a while loop makes the program deeper each time it goes round, and how often it does "
        "depends on its values; use a loop of a fixed length, such as jax.lax.scan."
    )


def _cond(eqn, levels, mode, repeat):
    index, *operands = levels
    branches = [_run(b.jaxpr, operands, mode, repeat) for b in eqn.params["branches"]]
    return [functools.reduce(_later, results, index) for results in zip(*branches, strict=True)]


def _move(eqn, levels, *_):
    """What moves numbers and computes none leaves an array of the cache one."""
    return [functools.reduce(_later, levels, _Level())] * len(eqn.outvars)


def _compute(eqn, levels, mode, repeat):
    """A function called, or an operation of JAX."""
    for inner in eqn.params.values():
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(levels):
            return _run(inner, levels, mode, repeat)
    steps = [level.last + level.of_cache for level in levels]
    return [_Level((max(steps, default=0),))] * len(eqn.outvars)


# fmt: off
_MOVES = (
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice",
    "dynamic_update_slice", "gather", "optimization_barrier", "pad", "reduce_precision", "reshape",
    "rev", "scatter", "select_n", "sharding_constraint", "slice", "split", "squeeze", "transpose",
)
# fmt: on
_RULES = dict.fromkeys(_MOVES, _move) | {
    write_read_p.name: _write_read,
    read_p.name: _read,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _last(levels):
    return max((level.last for level in levels), default=0)


def _later(a, b):
    """The later of two levels."""
    same = len(a.steps) == len(b.steps)
    steps = tuple(map(max, a.steps, b.steps)) if same else (max(a.last, b.last),)
    return _Level(steps, a.of_cache or b.of_cache)
