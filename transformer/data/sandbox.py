"""jinja2's sandbox for chat templates, with limits on their time and on what they make.

A template is a program of whoever published the model. jinja2 keeps it from everything but what it
is given; but in a few characters it can ask for years of work, or for more memory than there is.
"""

import contextlib
import datetime
import functools
import inspect
import json
import re
import sys
import threading
import time

import jinja2
from jinja2 import compiler, ext, sandbox

_SECONDS = 1  # of processor time
_LARGEST_NUMBER = 10**6  # as an argument, which may be how often or how wide
_LONGEST = 10**7  # characters of a text, or elements of a list
_MOST = 10**8  # characters that one operation makes of several texts
_ALTOGETHER = 5 * 10**8  # characters that all operations make
_WIDTH = re.compile(r"\d{7}")
_SLOW = ("striptags", "urlize", "wordwrap")  # no template of a chat needs them

_made = threading.local()


class _Code(compiler.CodeGenerator):
    """Code in which `~` is a method of the environment."""

    def visit_Concat(self, node, frame):
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """An environment for templates that nobody has looked at.

    What operators, filters and calls take and give is checked, as each could fill the memory.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])
    code_generator_class = _Code

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters = {
            name: _checked(filter) for name, filter in self.filters.items() if name not in _SLOW
        }
        del self.globals["lipsum"]
        # What transformers gives to templates.
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def call_binop(self, context, operator, left, right):
        """As in jinja2."""
        numbers = all(isinstance(x, int | float) and abs(x) <= 2**32 for x in (left, right))
        if operator == "**" or (operator == "*" and not numbers):
            raise sandbox.SecurityError(f"{operator} of large values is not allowed")
        if operator == "%":
            _check(left, right)
        return _limited(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args, **kwargs):
        """As in jinja2."""
        _check(getattr(inspect.unwrap(__obj), "__self__", None), *args, *kwargs.values())
        return _limited(super().call(__context, __obj, *args, **kwargs))

    def joined(self, parts):
        """The texts of some values, one behind the other."""
        return _limited("".join(map(str, parts)))


@contextlib.contextmanager
def limits():
    """Has templates fail that take too long, or make too much, in this thread.

    Raises:
      jinja2.exceptions.SecurityError: one does.
    """
    end, before = time.thread_time() + _SECONDS, sys.gettrace()
    _made.characters = 0

    def trace(frame, event, argument):
        if time.thread_time() > end:
            raise sandbox.SecurityError(f"it takes longer than {_SECONDS} s")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _checked(function):
    @functools.wraps(function)
    def checked(*args, **kwargs):
        _check(*args, *kwargs.values())
        return _limited(function(*args, **kwargs))

    return checked


def _check(*operands):
    """Refuses operands of which one operation can make more than there is room for."""
    size = 1
    for x in operands:
        inner = x if isinstance(x, tuple) else (x,)
        if any(isinstance(n, int) and abs(n) > _LARGEST_NUMBER for n in inner):
            raise sandbox.SecurityError("such large numbers are not allowed here")
        size *= max(_size(x), 1)
    formats = [x for x in operands if isinstance(x, str) and ("%" in x or "{" in x)]
    if size > _MOST or any(map(_WIDTH.search, formats)):
        raise sandbox.SecurityError("such long texts are not allowed here")


def _size(x):
    if isinstance(x, str):
        return len(x)
    if isinstance(x, list | tuple):
        return len(x) + sum(len(part) for part in x if isinstance(part, str))
    return 1


def _limited(x):
    if isinstance(x, str | list | tuple):
        size = _size(x)
        _made.characters = getattr(_made, "characters", 0) + size
        if size > _LONGEST or _made.characters > _ALTOGETHER:
            raise sandbox.SecurityError("it makes too many characters")
    return x


def _to_json(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message):
    raise jinja2.TemplateError(message)
