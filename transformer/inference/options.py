"""What people choose when they generate: one list of options, for Python and the command line."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformer.checks import whole_number
from transformer.inference.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `generate` and `stream`, checked.

    Attributes:
      max_new_tokens: at least 1. The end of a document always stops a completion.
      temperature: 0 or more; 0 takes the most likely token.
      top_k: at least 1: only the k most likely tokens are drawn; None: all.
      top_p: above 0, at most 1: only the most likely tokens that hold this much probability; None:
        all.
      min_p: 0 to 1: only tokens at least this fraction as likely as the most likely one; None: all.
      seed: 0 or more.
      stop: texts and token ids that stop a completion where they first appear in it.
      numerics, attention: as in `program`.
      program: what runs in the place of `program(config, ...)`: one for the same parameters and
        cache, such as `intervene` makes; None: the model's own.

    Raises:
      ValueError: a number is outside of its range.
      TypeError: something is not a number.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: str | int | Sequence[str | int] = ()
    numerics: str = "fast"
    attention: str = "auto"
    program: Callable | None = None

    def __post_init__(self):
        read = lambda name, value: object.__setattr__(self, name, value)
        read("max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens, least=1))
        read("seed", whole_number("seed", self.seed))
        self.sampling(None)

    def sampling(self, vocab_size: int | None) -> Sampling:
        """Returns how tokens are drawn, from ids below `vocab_size`."""
        return Sampling.make(self.temperature, self.top_k, self.top_p, self.min_p, vocab_size)


def takes_options(function: Callable) -> Callable:
    """Shows the fields of `Options` in the signature of a function that takes them as keywords."""
    own = list(inspect.signature(function).parameters.values())
    own = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    fields = inspect.signature(Options).parameters.values()
    function.__signature__ = inspect.Signature(
        [
            *(parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY),
            *fields,
            *(parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY),
        ]
    )
    return function
