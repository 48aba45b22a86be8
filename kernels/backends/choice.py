"""The backends that can run attention, and the choice among them.

A backend is a module with `attend(q, keys, values, where, shared, *, options) -> (z, lse)`, and,
where it has a way of its own to run one token on blocks as they lie, with

    decode(blocks, i, cell, q, shared, *, options) -> (arrays, z)
    read(blocks, i, q, shared, *, options) -> z

as in `kernels.write_read`; where it has one to write a chunk, `write` as in `kernels.cells`; and,
where it has one order of sums, `product` as below. A backend that cannot do what it is asked to
raises NotImplementedError with the reason, before it computes anything.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kernels import cells as slices
from kernels.operands import Shared, Where
from kernels.options import Options
from kernels.tracing.reverse import NoSuchDerivative, reverse_only
from kernels.tracing.target import platform

BACKENDS = {
    "reference": "kernels.backends.reference",
    "xla": "kernels.backends.xla",
    "triton": "kernels.backends.triton",
    "triton_interpret": "kernels.backends.triton.interpret",
    "cudnn": "kernels.backends.cudnn",
    "tokamax": "kernels.backends.tokamax",
    "splash": "kernels.backends.splash",
    "splash_interpret": "kernels.backends.splash_interpret",
}
# What "auto" tries, in order.
AUTO = {"cpu": ("xla",), "gpu": ("triton", "xla"), "tpu": ("splash", "xla")}
# What it tries before them where positions are known while tracing, as those of a program are not.
# Such a backend does some of what is asked for, and is passed over without a word.
AUTO_KNOWN = {"gpu": ("cudnn",)}
EXACT = ("xla", "triton", "triton_interpret")  # those with one order of sums
FORWARD_MODE = ("xla", "reference")  # those that jax.jvp and jax.linearize go through
_NO_FORWARD_MODE = (
    "attention backend {!r} has first derivatives in reverse mode only (jax.grad, jax.vjp); for "
    f"jax.jvp, jax.linearize and Hessian-vector products use one of {', '.join(FORWARD_MODE)}."
)
_PACKAGES = {
    "triton": "jax-triton (pip install -e '.[cuda]')",
    "tokamax": "tokamax (pip install -e '.[tokamax]', on Python 3.12 or newer)",
}

_logger = logging.getLogger(__name__)


class _Refusal(NotImplementedError):
    """Names the backend that was chosen."""


def check_backend(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or one of `BACKENDS`."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"attention backend {name!r} does not exist; choose one of "
            f"{', '.join(['auto', *BACKENDS])}."
        )


def run(name: str, call: Callable, *, known: bool = False):
    """Runs `call(backend)` with the module of a backend.

    Args:
      name: one of `BACKENDS`; or "auto", which takes the first of `AUTO` for the platform that can
        do it. The choice is logged once: as information, or as a warning if a better backend had to
        be passed over.
      call: a function of the module, traced.
      known: whether positions are known while tracing; "auto" then tries `AUTO_KNOWN` before.

    Raises:
      ValueError: there is no such backend.
      NotImplementedError: the backend cannot do it, for the reason given; "auto": none can.
    """
    check_backend(name)
    if name != "auto":
        try:
            return call(_load(name))
        except (_Refusal, NoSuchDerivative):
            raise
        except NotImplementedError as error:
            raise _Refusal(f"attention backend {name!r}: {error}") from error
    reasons, first = {}, AUTO_KNOWN.get(platform(), ()) if known else ()
    for candidate in (*first, *AUTO[platform()]):
        try:
            result = call(_load(candidate))
        except NoSuchDerivative:
            raise
        except NotImplementedError as error:
            reasons[candidate] = str(error)
        else:
            wanted = tuple((name, why) for name, why in reasons.items() if name not in first)
            _say(platform(), candidate, wanted)
            return result
    raise NotImplementedError(
        f"no attention backend for a {platform()} can do this:\n" + _listed(reasons.items())
    )


def attend(
    name: str,
    q,
    keys,
    values,
    where: Where,
    shared: Shared,
    *,
    options: Options,
    needs_lse: bool = False,
):
    """Runs the `attend` of a backend, as `run` chooses it.

    Returns:
      (z, lse); lse is None where a backend does not give it, which `needs_lse` refuses.

    Raises:
      ValueError, NotImplementedError: as in `run`. Also where a backend without a forward mode is
        differentiated in it; this shows when the tangent is evaluated or lowered.
    """

    def call(module):
        check_exact(module, options)
        # NumPy's arrays stay known while tracing, which some backends need.
        fields = {name: x for name, x in vars(where).items() if isinstance(x, np.ndarray)}

        def attend(moving, fixed):
            (*arrays, sinks), (where, alibi) = moving, fixed
            operands = *arrays, replace(where, **fields), Shared(sinks, alibi)
            return module.attend(*operands, options=options)

        chosen = _name(module)
        if chosen not in FORWARD_MODE:
            attend = reverse_only(attend, _NO_FORWARD_MODE.format(chosen))
        z, lse = attend((q, keys, values, shared.sinks), (where, shared.alibi))
        if needs_lse and lse is None:
            raise NotImplementedError("it does not give the log-sum-exp.")
        return z, lse

    return run(name, call, known=isinstance(where.q_positions, np.ndarray))


def write(name: str, block, cells, new):
    """Runs `kernels.cells.write`, by the way of its own that a backend may have.

    name: as in `run`.
    """
    for candidate in AUTO[platform()] if name == "auto" else (name,):
        with contextlib.suppress(NotImplementedError):
            module = _load(candidate)
            if hasattr(module, "write"):
                return module.write(block, cells, new)
    return slices.write(block, cells, new)


def product(x, w):
    """x [M, K] @ w [K, N] -> [M, N], in one order of sums, where a backend has a way of its own.

    Returns None where that of this platform has none.
    """
    for candidate in AUTO[platform()]:
        with contextlib.suppress(NotImplementedError):
            module = _load(candidate)
            if hasattr(module, "product"):
                return module.product(x, w)
    return None


def refuse(reasons: dict[str, bool]) -> None:
    """Raises NotImplementedError with those of a backend's reasons that apply, if any does."""
    refused = [reason for reason, applies in reasons.items() if applies]
    if refused:
        raise NotImplementedError("; ".join(refused) + ".")


def check_exact(module, options: Options) -> None:
    """Refuses exact options on a backend without one order of sums.

    Raises:
      NotImplementedError: the backend is none of `EXACT`.
    """
    if options.exact and _name(module) not in EXACT:
        raise NotImplementedError(
            f"exact numerics need one order of sums, which only {', '.join(EXACT)} keeps."
        )


def _name(module):
    return next(name for name, path in BACKENDS.items() if path == module.__name__)


def _load(name):
    try:
        return importlib.import_module(BACKENDS[name])
    except ImportError as error:
        package = _PACKAGES.get(name.split("_")[0], "a package that is missing")
        raise NotImplementedError(f"it needs {package}: {error}") from error


@functools.cache
def _say(platform, chosen, reasons):
    level = logging.WARNING if reasons else logging.INFO
    because = f", because others cannot:\n{_listed(reasons)}" if reasons else ""
    _logger.log(level, "attention on a %s runs on the backend %r%s", platform, chosen, because)


def _listed(reasons):
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons)
