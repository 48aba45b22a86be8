"""What people choose when they generate: one list of options, for Python and the command line."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformer.checks import whole_number
from transformer.inference.adjust import Adjustments, bias, penalties
from transformer.inference.drawn import Wanted
from transformer.inference.sampling import Sampling

LOGPROBS = ("model", "truncated")


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
      repetition_penalty: above 0; logits of ids in the prompt or the completion are divided by it,
        or multiplied where they are negative; 1: nothing is.
      presence_penalty, frequency_penalty: subtracted from the logits of ids in the completion, the
        one once, the other as often as they are there.
      logit_bias: what is added to the logits of some ids; -inf forbids one.
      logits_processor: a function that JAX can trace, (logits [V], tokens [S]) -> logits [V], which
        sees prompt and completion so far, with -1 behind, and forbids ids by -inf, but never all.
        It comes after penalties and bias, before temperature and filters.
      top_logprobs: how many of the most likely tokens are returned at each step, with the model's
        own log-probabilities.
      num_samples: completions of each prompt, which runs once for all of them.
      batch_size: how many sequences run at once, at least 1; where one ends, the next takes its
        place. None: all of them.
      draft: how tokens are guessed that the model then checks several at a time, which changes the
        speed and nothing else: a `Lookup` or a `Smaller` of `inference.speculation`; None: no
        tokens are.
      logprobs: "model": those of the model itself, before temperature and filters; "truncated":
        also those of the distribution that was drawn from, and which tokens it kept, one bool for
        each id of the vocabulary and each token.
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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processor: Callable | None = None
    top_logprobs: int = 0
    num_samples: int = 1
    batch_size: int | None = None
    draft: Any = None
    logprobs: str = "model"
    numerics: str = "fast"
    attention: str = "auto"
    program: Callable | None = None

    def __post_init__(self):
        read = lambda name, value: object.__setattr__(self, name, value)
        read("max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens, least=1))
        read("seed", whole_number("seed", self.seed))
        read("top_logprobs", whole_number("top_logprobs", self.top_logprobs))
        read("num_samples", whole_number("num_samples", self.num_samples, least=1))
        if self.batch_size is not None:
            read("batch_size", whole_number("batch_size", self.batch_size, least=1))
        if self.logprobs not in LOGPROBS:
            raise ValueError(
                f"logprobs={self.logprobs!r} does not exist; choose one of {', '.join(LOGPROBS)}."
            )
        self.sampling(None)
        self._penalties()

    def sampling(self, vocab_size: int | None) -> Sampling:
        """Returns how tokens are drawn, from ids below `vocab_size`."""
        return Sampling.make(self.temperature, self.top_k, self.top_p, self.min_p, vocab_size)

    @property
    def wanted(self) -> Wanted:
        """What is told beside tokens and their log-probabilities."""
        return Wanted(self.top_logprobs, self.logprobs == "truncated")

    def adjustments(self, vocab_size: int) -> Adjustments:
        """Returns what is done to logits [V] before that, V being the config's.

        Raises:
          ValueError, TypeError: logit_bias is not one for that many ids, or top_logprobs is more.
        """
        if self.top_logprobs > vocab_size:
            raise ValueError(f"top_logprobs={self.top_logprobs}; there are {vocab_size} tokens.")
        return Adjustments(
            self._penalties(), bias(self.logit_bias, vocab_size), self.logits_processor
        )

    def _penalties(self):
        return penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty)


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
