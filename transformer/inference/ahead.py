"""Functions compiled before they are called, and what tracing made of them kept for the next start.

JAX's own cache knows a program by what tracing makes of it, and a model of many layers takes longer
to trace than it takes to read what was compiled. Here a program is known by the sources of this
project, by its arguments and by the settings, so that a start need not trace it again.
"""

import hashlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np
from jax import export

from kernels.cpu import call, kept

_SOURCES = [Path(__file__).parents[2] / house for house in ("kernels", "transformer")]
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")  # of an object, which is another one in each process


class Ahead:
    """A function of `jax.jit` that may be compiled for some arguments before it is called."""

    def __init__(self, function: Callable, static: Sequence[int], donated: Sequence[int]):
        """Wraps a function.

        Args:
          function: of `jax.jit`.
          static, donated: the places of its arguments that are so.
        """
        self._function, self._static, self._donated = function, static, donated
        self._compiled = self._compiled_for = None

    def compile(self, *args, keep: bool) -> None:
        """Compiles it for arguments like these; of arrays the shapes are enough.

        Args:
          *args: as for a call.
          keep: whether what tracing makes of it is kept for the next process, and taken from one
            before. Only where nothing that is traced was changed since it was imported.
        """
        self._compiled_for = [args[n] for n in self._static]
        name = self._name(args) if keep and call.is_available() else None
        if name is None:
            self._compiled = self._function.lower(*args).compile()
            return
        try:
            exported, structure = _restored(kept.found(name))
        except Exception:  # there is nothing, or whatever else is wrong with it
            exported, structure = _restored(kept.keep(name, self._traced(args)))

        def run(*args):
            return jax.tree.unflatten(structure, exported.call(*jax.tree.leaves(args)))

        is_donated = [n in self._donated for n in range(len(args)) if n not in self._static]
        run = jax.jit(run, donate_argnums=np.flatnonzero(is_donated).tolist())
        self._compiled = run.lower(*self._dynamic(args)).compile()

    def __call__(self, *args):
        """The function; what was compiled ahead runs if it was for such arguments."""
        if self._compiled is not None and self._compiled_for == [args[n] for n in self._static]:
            try:
                return self._compiled(*self._dynamic(args))
            except TypeError:  # they are of another kind, which is said before anything runs
                self._compiled = None
        return self._function(*args)

    def _dynamic(self, args):
        return [x for n, x in enumerate(args) if n not in self._static]

    def _traced(self, args):
        """What `_restored` takes."""
        leaves, structure = jax.tree.flatten(self._dynamic(args))
        result = []

        def run(*leaves):
            dynamic = iter(jax.tree.unflatten(structure, leaves))
            full = [x if n in self._static else next(dynamic) for n, x in enumerate(args)]
            leaves, form = jax.tree.flatten(self._function(*full))
            result.append(form)
            return leaves

        run = jax.jit(run)
        run.lower(*leaves)  # now XLA is told of all kernels
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in call.names()]
        exported = export.export(run, disabled_checks=checks)(*leaves)
        program = exported.mlir_module()
        kernels = [name for name in call.names() if f"@{name}(" in program]
        return pickle.dumps((kernels, result[0], bytes(exported.serialize())))

    def _name(self, args):
        """That of its file: it says all that the program depends on. None: that cannot be said."""
        leaves, structure = jax.tree.flatten(args)
        described = f"{[_described(x) for x in leaves]} {structure}"
        if _ADDRESS.search(described):
            return None
        name = self._function.__name__.strip("_")
        number = hashlib.sha256(f"{name} {described} {_settings()}".encode()).hexdigest()[:32]
        return f"unison_{name}_{number}_{_origin()}"


def _described(x):
    shape = getattr(x, "shape", None)
    return repr(x) if shape is None else (shape, str(x.dtype), getattr(x, "weak_type", False))


def _settings():
    """What else tracing depends on: not on where compiled programs are kept."""
    values = sorted((k, v) for k, v in jax.config.values.items() if "_cache" not in k)
    return f"{values} {os.environ.get('XLA_FLAGS')} {jax.devices()} {np.__version__}"


@cache
def _origin():
    return kept.origin(*_SOURCES) + f"_{sys.version_info.major}{sys.version_info.minor}"


def _restored(content):
    """What was traced, its kernels told to XLA, and the structure of what it gives."""
    kernels, structure, exported = pickle.loads(content)
    for name in kernels:
        if not call.restore(name):
            raise FileNotFoundError(name)
    return export.deserialize(bytearray(exported)), structure
