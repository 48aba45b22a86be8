"""Completions: what a model wrote after a prompt, put together from tokens that come one by one."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from transformer.data.tokenizer import IncrementalDecoder, Tokenizer
from transformer.inference.drawn import Drawn


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
      truncated_logprobs: of each token the log-probability in the distribution that it was drawn
        from, after temperature and filters; None where they were not asked for.
      kept: [tokens, V] bool, which tokens that distribution kept; None likewise.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]]
    truncated_logprobs: list[float] | None = None
    kept: np.ndarray | None = None


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
        self._text, self._drawn = "", []
        self._held = ""  # may be the beginning of a stop text

    def __len__(self) -> int:
        """How many tokens there are so far."""
        return len(self._drawn)

    def push(self, drawn: Drawn) -> str:
        """Takes the next token and returns the text that is now certain, often the empty string.

        Args:
          drawn: one token; none may follow once the completion is whole.

        Raises:
          FloatingPointError: the logprob is not finite.
        """
        if not np.isfinite(drawn.logprob):
            raise FloatingPointError(
                f"the logits of new token {len(self)} are not finite; "
                "the model's parameters are damaged, or its training diverged."
            )
        self._drawn.append(drawn)
        token = int(drawn.token)
        if token in self._stop_tokens:
            return self._finish(self._held + self._decoder.finish(), "stop")
        text = self._held + self._decoder.push(token)
        found = [text.find(stop) for stop in self._stop_texts if stop in text]
        if found:
            return self._finish(text[: min(found)], "stop")
        if len(self) == self._max_new_tokens:
            return self._finish(text + self._decoder.finish(), "length")
        certain = len(text) - _overlap(text, self._stop_texts)
        self._held = text[certain:]
        self._text += text[:certain]
        return text[:certain]

    def _finish(self, text, reason):
        drawn = self._drawn
        narrowed = [x.truncated for x in drawn if x.truncated is not None]
        self.completion = Completion(
            text=self._text + text,
            tokens=[int(x.token) for x in drawn],
            logprobs=[float(x.logprob) for x in drawn],
            finish_reason=reason,
            top_logprobs=[
                dict(zip(x.top[0].tolist(), x.top[1].tolist(), strict=True))
                for x in drawn
                if x.top is not None
            ],
            truncated_logprobs=[float(logprob) for logprob, _ in narrowed] or None,
            kept=np.stack([kept for _, kept in narrowed]) if narrowed else None,
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
