"""Whether a program is lawful: proved from its jaxpr, then tested by running it.

    python -m experiments.contract --program=examples.programs.attention:program
    python -m experiments.contract --program=examples/programs/unlawful/feedback.py:program
    python -m experiments.contract --preset=tiny          a transformer with fresh parameters
    python -m experiments.contract --workdir=runs/demo    a trained one

A program of one's own is a function program(params, cache, token, i) -> (cache, logits). Its module
also has init(key) -> params, empty(capacity) -> cache, and VOCAB_SIZE. The exit status is 0 for a
lawful program, 1 for an unlawful one, whose violations are printed, and 2 for wrong use.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from absl import flags

from experiments.run import cli

_PROGRAM = flags.DEFINE_string("program", None, "A program of one's own, as module:function.")
_PRESET = flags.DEFINE_string("preset", None, "Shape of a fresh model; see transformer.presets.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a trained model.")
_CAPACITY = flags.DEFINE_integer("capacity", 16, "Positions that the cache has.", lower_bound=1)
NAMES = ("init", "empty", "VOCAB_SIZE")  # what a module has beside its program


def main(argv):
    del argv
    if cli.one_of({"module:function": _PROGRAM, "NAME": _PRESET, "DIR": _WORKDIR}) is _PROGRAM:
        checked = of_program(_PROGRAM.value, _CAPACITY.value)
    else:
        checked = _of_config(_CAPACITY.value)

    from transformer.modes.contract import check_contract

    f, params, cache, vocab_size = checked
    with cli.user_errors(TypeError, ValueError):
        report = check_contract(f, params, cache, vocab_size=vocab_size)
    print(report)
    sys.exit(0 if report.lawful else 1)


def of_program(name: str, capacity: int):
    """A program of the user's by its name, "module:function": -> (f, params, cache, vocab_size)."""
    import jax

    place, colon, function = name.rpartition(":")
    if not colon:
        cli.fail(f"--program={name}; it is module:function, as in my_module:program.")
    module = _load(place)
    missing = [x for x in (function, *NAMES) if not hasattr(module, x)]
    if missing:
        cli.fail(
            f"{place} has no {', no '.join(missing)}. Beside the program it needs init(key), which "
            "returns the parameters, empty(capacity), which returns the cache, and VOCAB_SIZE."
        )
    try:
        params, cache = module.init(jax.random.key(0)), module.empty(capacity)
    except Exception as error:  # it is the user's code that runs
        cli.fail(f"init or empty of {place} failed: {type(error).__name__}: {error}")
    return getattr(module, function), params, cache, module.VOCAB_SIZE


def _load(place):
    """A module by its name or by its file."""
    try:
        if not place.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(place)
        path = Path(place)
        sys.path[:0] = [str(path.parent), ""]
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # it is the user's code that runs
        cli.fail(f"{place} cannot be loaded: {type(error).__name__}: {error}")


def _of_config(capacity):
    """A transformer of this package: -> (f, params, cache, vocab_size)."""
    import jax

    from transformer.presets import presets
    from transformer.program.init import init_cache, init_params
    from transformer.program.program import program
    from transformer.storage.checkpoint import CheckpointError
    from transformer.storage.model import load

    with cli.user_errors(ValueError, OSError, CheckpointError):
        if _WORKDIR.value is not None:
            model = load(_WORKDIR.value)
            config, params = model.config, model.params
        elif _PRESET.value in presets:
            config = presets[_PRESET.value]
            params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
        else:
            names = ", ".join(presets)
            cli.fail(f"--preset={_PRESET.value} does not exist; choose one of {names}.")
        cache = init_cache(config, min(capacity, config.max_length))
        return program(config), params, cache, config.vocab_size


if __name__ == "__main__":
    cli.start(main)
