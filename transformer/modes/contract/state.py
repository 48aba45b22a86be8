"""What a program holds between two calls: the variables that its code can reach.

A function of one token has no business with them but to read what never changes: parameters of its
own, shapes, other functions. Arrays of a cache in there, or values that change while the program is
traced, carry something from token to token.
"""

import contextlib
import dis
import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from transformer.memory.cache import Cache, Turn
from transformer.modes.contract import source

_DEPTH, _COUNT = 8, 10_000  # how far attributes, items and functions are followed
_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_SEQUENCES = (list, tuple, set, frozenset, deque)


@dataclass(frozen=True)
class Held:
    """A value that a program can reach.

    name: how its code reaches it. where: the line that does.
    """

    name: str
    where: str
    value: Any


def held(f) -> list[Held]:
    """Everything that the code of f can reach, outermost first."""
    found, seen, queue = [], set(), deque([(Held("f", source.of_function(f), f), 0)])
    while queue and len(found) < _COUNT:
        at, depth = queue.popleft()
        if id(at.value) in seen:
            continue
        if not isinstance(at.value, _PLAIN):  # those are equal to others by chance
            seen.add(id(at.value))
        found.append(at)
        if depth < _DEPTH:
            queue += [(child, depth + 1) for child in _children(at)]
    return found


def caches(found: list[Held]) -> list[Held]:
    """The caches and turns among them."""
    return [at for at in found if isinstance(at.value, Cache | Turn)]


def tracers(found: list[Held]) -> list[Held]:
    """Values of a trace, which end with it."""
    return [at for at in found if isinstance(at.value, jax.core.Tracer)]


def contents(found: list[Held]) -> dict[str, tuple[Held, Any]]:
    """What may change without being replaced, by name, in a form that can be compared."""
    return {at.name: (at, _content(at.value)) for at in found}


def _content(x):
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, np.ndarray):
        return x.shape, x.dtype, x.tobytes()
    if isinstance(x, (dict, *_SEQUENCES)):
        return type(x), len(x)
    return _Same(x)


@dataclass(frozen=True)
class _Same:
    """Equal to itself alone, and kept alive so that nothing else gets its identity."""

    value: Any

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value


def _children(at: Held) -> Iterator[Held]:
    """What can be reached from a value in one step."""
    x = at.value
    child = lambda name, value, where=at.where: Held(name, where, value)
    if isinstance(x, functools.partial):
        yield child(at.name, x.func)
        yield child(f"{at.name}.args", x.args)
        yield child(f"{at.name}.keywords", x.keywords)
    elif isinstance(x, types.MethodType):
        yield child(f"{at.name}.__self__", x.__self__)
        yield child(at.name, x.__func__)
    elif isinstance(x, types.FunctionType):
        yield from _of_function(x)
    elif isinstance(x, dict):
        yield from (child(f"{at.name}[{key!r}]", value) for key, value in list(x.items()))
    elif isinstance(x, _SEQUENCES):
        yield from (child(f"{at.name}[{n}]", value) for n, value in enumerate(list(x)))
    elif hasattr(x, "__wrapped__"):
        yield child(at.name, x.__wrapped__)
    elif not isinstance(x, types.ModuleType | jax.Array | np.ndarray | jax.core.Tracer):
        attributes = getattr(x, "__dict__", {}) if _is_the_users(x) else {}
        lines = _uses_of_class(type(x))
        for name, value in list(attributes.items()):
            yield child(f"{at.name}.{name}", value, lines.get(name, at.where))
        if not isinstance(x, type) and _is_the_users(type(x)):
            yield child(type(x).__name__, type(x))


def _of_function(f) -> Iterator[Held]:
    """The variables of a function's code that outlive a call: globals, closures, defaults."""
    if source.is_library(f.__code__.co_filename):
        return
    begin = source.of_code(f.__code__)
    lines = dict(_uses(f.__code__))
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that is not set yet
            yield Held(name, lines.get(name, begin), cell.cell_contents)
    for name in lines.keys() & f.__globals__.keys():
        value = f.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield Held(name, lines[name], value)
        elif not source.is_library(getattr(value, "__file__", None) or "<frozen"):
            for attribute in lines.keys() & vars(value).keys():
                yield Held(f"{name}.{attribute}", lines[attribute], vars(value)[attribute])
    yield from (Held("a default", begin, x) for x in f.__defaults__ or ())
    yield from (Held(name, begin, x) for name, x in (f.__kwdefaults__ or {}).items())
    yield from (Held(f"{f.__name__}.{name}", begin, x) for name, x in vars(f).items())


def _uses(code) -> Iterator[tuple[str, str]]:
    """The names that a code object and those within it use, each with a line that does."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _uses(constant)
    names = {*code.co_names, *code.co_freevars}
    for instruction in reversed(list(dis.get_instructions(code))):
        if instruction.argval in names and instruction.positions.lineno:
            yield instruction.argval, f"{code.co_filename}:{instruction.positions.lineno}"


def _uses_of_class(cls):
    """The names that the methods of a class use, each with a line that does."""
    methods = [x for x in vars(cls).values() if isinstance(x, types.FunctionType)]
    return {name: line for method in methods for name, line in _uses(method.__code__)}


def _is_the_users(x):
    """Whether x is no class, or one that the user has written."""
    if not isinstance(x, type):
        return True
    module = sys.modules.get(x.__module__)
    return not source.is_library(getattr(module, "__file__", None) or "<frozen")
