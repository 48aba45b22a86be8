"""Completions: what a model wrote after a prompt, put together from tokens that come one by one."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from transformer.data.tokenizer import IncrementalDecoder, Tokenizer


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
      text: the tokens decoded, without what stopped it.
      tokens: ids of all new tokens; the last one is, or completes, what stopped it, if anything
        did.
      logprobs: the model's log-probability of each token, before temperature and filters.
      finish_reason: "stop" or "length".
      top_logprobs: for each token the most likely ids in its place, with their log-probabilities,
        the likeliest first; as many as were asked for, and an empty list where none were.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]]


@dataclass(frozen=True)
class Piece:
    """The next piece of a completion.

    Attributes:
      index: of the prompt.
      text: what is new, in whole characters.
      completion: the whole, with the last piece only.
    """

    index: int
    text: str
    completion: Completion | None = None


class Writer:
    """Makes a completion of tokens that come one by one; `completion` is None until it is whole.

    Args:
      tokenizer: decodes the tokens; None: the text stays empty.
      stop_texts: none is empty; the first to appear in the text stops it.
      stop_tokens: each stops the completion, and is not decoded.
      max_new_tokens: at least 1; the completion stops with this many.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop_texts: Sequence[str],
        stop_tokens: Set[int],
        max_new_tokens: int,
    ):
        self.completion: Completion | None = None
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer else _NoText()
        self._stop_texts, self._stop_tokens = stop_texts, stop_tokens
        self._max_new_tokens = max_new_tokens
        self._text, self._tokens, self._logprobs, self._top_logprobs = "", [], [], []
        self._held = ""  # may be the beginning of a stop text

    def __len__(self) -> int:
        """How many tokens there are so far."""
        return len(self._tokens)

    def push(self, token: int, logprob: float, top: Mapping[int, float] | None = None) -> str:
        """Takes the next token and returns the text that is now certain, often the empty string.

        Args:
          token: an id; none may follow once the completion is whole.
          logprob: its log-probability.
          top: the most likely ids and their log-probabilities, if they are asked for.

        Raises:
          FloatingPointError: the logprob is not finite.
        """
        if not np.isfinite(logprob):
            raise FloatingPointError(
                f"the logits of new token {len(self._tokens)} are not finite; "
                "the model's parameters are damaged, or its training diverged."
            )
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if top:
            self._top_logprobs.append(dict(top))
        if token in self._stop_tokens:
            return self._finish(self._held + self._decoder.finish(), "stop")
        text = self._held + self._decoder.push(token)
        found = [text.find(stop) for stop in self._stop_texts if stop in text]
        if found:
            return self._finish(text[: min(found)], "stop")
        if len(self._tokens) == self._max_new_tokens:
            return self._finish(text + self._decoder.finish(), "length")
        certain = len(text) - _overlap(text, self._stop_texts)
        self._held = text[certain:]
        self._text += text[:certain]
        return text[:certain]

    def _finish(self, text, reason):
        self.completion = Completion(
            self._text + text, self._tokens, self._logprobs, reason, self._top_logprobs
        )
        return text


class _NoText:
    """The decoder of a model that has no tokenizer."""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def _overlap(text: str, stops) -> int:
    """How many characters at the end of the text are the beginning of a stop text, at most."""
    sizes = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(sizes, default=0)
