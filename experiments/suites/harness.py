"""A model as lm-evaluation-harness sees one: likelihoods of texts, and completions."""

from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from transformer.data.chat import render
from transformer.inference.generate import generate
from transformer.inference.score import judge
from transformer.storage.model import Model

_NEW_TOKENS = 256  # of a completion, where a task does not say
# What a task may say about generation, besides where it stops.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class Harness(TemplateLM):
    """The requests of lm-evaluation-harness, answered by a model.

    The harness cuts texts into context and continuation. What is longer than the model's max_length
    loses its beginning, as with the harness's own models.
    """

    def __init__(self, model: Model, batch_size: int = 8):
        """Takes a model that has a tokenizer.

        Args:
          model: the model.
          batch_size: completions that are drawn at once.

        Raises:
          ValueError: the model has no tokenizer, or one without a token that ends texts.
        """
        super().__init__()
        if model.tokenizer is None or model.tokenizer.end_of_document is None:
            raise ValueError("tasks are texts: the model needs a tokenizer, and a token for ends.")
        self._model, self._batch_size = model, batch_size
        self._tokens = model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokens.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self._tokens.document_start[-1]

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under."""
        return f"unison-{self._tokens.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's own template."""
        return self._tokens.chat_template or ""

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """The text of messages."""
        return render(self._tokens, chat_history, reply=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """The ids of a text, behind those that begin one unless they are there."""
        ids, begin = self._tokens.encode(string, special=True), list(self._tokens.begin)
        if add_special_tokens is False or ids[: len(begin)] == begin:
            return ids
        return begin + ids

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        return [self._likelihood(context, text) for _, context, text in requests]

    def _likelihood(self, context: Sequence[int], text: Sequence[int]) -> tuple[float, bool]:
        """The log-probability of a text behind a context, and whether it is the greedy one."""
        tokens = [*context, *text][-self._model.config.max_length :]
        if not text or len(tokens) <= len(text):
            raise ValueError(
                f"a continuation has {len(text)} tokens; it must have one, and fit behind one of "
                f"context in the model's max_length={self._model.config.max_length}."
            )
        logprobs, likeliest = judge(self._model, tokens)
        return float(logprobs[-len(text) :].sum()), bool(likeliest[-len(text) :].all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm=False) -> list[float]:
        """The log-probabilities of whole texts, in windows of the model's length."""
        return [self._rolling(*request.args) for request in requests]

    def _rolling(self, text):
        windows = get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._model.config.max_length - 1,
            context_len=1,
        )
        return sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests: list[Instance], disable_tqdm=False) -> list[str]:
        """Completions, each up to what stops it; those of equal settings run as one batch."""
        groups = {}
        for n, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(n)
        texts = {}
        for members in groups.values():
            options = _options(requests[members[0]].args[1])
            room = self._model.config.max_length - options["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={options['max_new_tokens']} leaves no room for a prompt in the "
                    f"model's max_length={self._model.config.max_length}."
                )
            prompts = [
                (self.tok_encode(requests[n].args[0]) or [self.prefix_token_id])[-room:]
                for n in members
            ]
            size = min(self._batch_size, len(prompts))
            completions = generate(self._model, prompts, batch_size=size, **options)
            texts |= {n: done.text for n, done in zip(members, completions, strict=True)}
        return [texts[n] for n in range(len(requests))]


def _options(settings):
    """The options of `generate` that a task's settings say.

    Raises:
      ValueError: a setting is not known.
    """
    settings = dict(settings)
    stop = settings.pop("until", None) or []
    options = {
        "stop": [text for text in ([stop] if isinstance(stop, str) else stop) if text],
        "max_new_tokens": settings.pop("max_gen_toks", _NEW_TOKENS),
    }
    if not settings.pop("do_sample", settings.get("temperature", 0) > 0):
        settings["temperature"] = 0.0
    unknown = sorted(set(settings) - set(_SAMPLING))
    if unknown:
        raise ValueError(
            f"the task sets {unknown[0]!r} for generation; those that can be set are until, "
            f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}."
        )
    return options | settings
