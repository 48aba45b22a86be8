"""Whether a program keeps the contract: proved from its jaxpr, then tested by running it."""

from collections.abc import Callable

from transformer.checks import whole_number
from transformer.memory.cache import Cache
from transformer.modes.contract import numeric, static
from transformer.modes.contract.findings import Findings
from transformer.modes.contract.report import Report, Violation

__all__ = ["Report", "Violation", "check_contract"]


def check_contract(f: Callable, params, cache: Cache, *, vocab_size: int) -> Report:
    """Checks that a program is lawful: that all tokens of a sequence may run at once.

    First its jaxpr is looked at, which proves the rules of `transformer.memory.rules.Rule` for
    every input. If they hold, the program runs on a few random tokens in every way, which tests
    what its memories do: that all ways agree, outputs and gradients, that no token changes those
    before it by a bit, and that other sequences, unwritten cells, padding, and capacity do not
    matter.

    Args:
      f: a program, f(params, cache, token, i) -> (cache, logits [V]); any function.
      params: its parameters, any pytree of arrays.
      cache: a cache for it, of one sequence; it may be empty, and is not changed.
      vocab_size: V; token ids are 0 to V - 1.

    Returns:
      The report; print it. An error that the program raises is a violation too.

    Raises:
      TypeError: f is not callable, cache is not a `Cache`, or vocab_size is not a whole number.
      ValueError: vocab_size is below 1.
    """
    if not callable(f):
        raise TypeError(f"f is {f!r}; it must be a function, f(params, cache, token, i).")
    if not isinstance(cache, Cache):
        raise TypeError(
            f"cache is of type {type(cache).__name__}; make it with init_cache(config, capacity) "
            "or Cache.empty(capacity, blocks)."
        )
    vocab_size = whole_number("vocab_size", vocab_size, least=1)
    findings = Findings()
    once, written = static.check(f, params, cache, vocab_size, findings)
    if not findings:
        numeric.check(f, params, cache, vocab_size, once, written, findings)
    return findings.report()
