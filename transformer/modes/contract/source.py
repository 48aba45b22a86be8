"""Where in the user's code something is, as "file:line"."""

import sysconfig
import traceback
from pathlib import Path

import jax

import kernels

CHECK = str(Path(__file__).parent)
# Code that is not the user's: that of this repository, and what is installed.
OURS = str(Path(__file__).parents[2]), str(Path(kernels.__file__).parent)
INSTALLED = (
    "<frozen",
    str(Path(jax.__file__).parent),
    *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
)


def of_equation(eqn) -> str | None:
    """The line that made an equation of a jaxpr; None where no trace of it is left."""
    if eqn.source_info.traceback is None:
        return None
    return _innermost((f.file_name, f.line_num) for f in eqn.source_info.traceback.frames)


def of_error(error: BaseException) -> str | None:
    """The line that raised an error; None where it did not come from within a check."""
    frames = traceback.extract_tb(error.__traceback__)
    return _innermost((f.filename, f.lineno) for f in reversed(frames))


def of_function(f) -> str:
    """The line at which a function begins, or how an object that is called is called."""
    code = code_of(f)
    return f"{type(f).__name__}:1" if code is None else of_code(code)


def of_code(code) -> str:
    """The line at which a code object begins."""
    return f"{code.co_filename}:{code.co_firstlineno}"


def code_of(f):
    """The code of a function under decorators, `partial` and `jax.jit`; None where it has none."""
    while not hasattr(f, "__code__"):
        inner = [
            getattr(f, name) for name in ("func", "__wrapped__", "__func__") if hasattr(f, name)
        ]
        if not inner and not hasattr(type(f).__call__, "__code__"):
            return None
        f = inner[0] if inner else type(f).__call__
    return f.__code__


def is_library(filename: str) -> bool:
    """Whether a file is of this repository's packages or installed, and so is not the user's."""
    return filename.startswith((*OURS, *INSTALLED))


def is_installed(filename: str) -> bool:
    """Whether a file belongs to what is installed."""
    return filename.startswith(INSTALLED)


def _innermost(frames):
    """The innermost frame of the user's code, else of this repository's.

    `frames` go outwards. Those beyond the check's own belong to who called it.
    """
    own = None
    for filename, line in frames:
        if filename.startswith(CHECK):
            break
        if not is_library(filename):
            return f"{filename}:{line}"
        if own is None and filename.startswith(OURS):
            own = f"{filename}:{line}"
    return own
