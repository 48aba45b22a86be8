"""What `generate` is given, checked: prompts and their random keys, and what stops a completion."""

import zlib
from collections.abc import Sequence

import numpy as np

from transformer.checks import token_ids
from transformer.config import Config
from transformer.data.tokenizer import Tokenizer, require_utf8


def prompt_tokens(
    config: Config,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
) -> list[np.ndarray]:
    """Checks the prompts and returns the token ids of each, int32 [T].

    Args:
      config: its vocab_size bounds the ids, its max_length a prompt with its new tokens.
      tokenizer: encodes the texts, each behind the ids that begin a text; None: there are none.
      prompts: each is a text or token ids [T], neither empty.
      max_new_tokens: how many tokens may follow a prompt.

    Raises:
      ValueError: no prompts, an empty prompt, ids outside of the vocabulary, or a prompt that with
        its new tokens exceeds config.max_length.
      TypeError: prompts is not a sequence of texts and ids.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts={prompts!r}; give a list of prompts, also for a single one.")
    if not len(prompts):
        raise ValueError("prompts is empty; give at least one prompt.")
    rows = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            tokens = _encoded(tokenizer, prompt, f"prompt {index}") if prompt else []
        else:
            tokens = prompt
        if hasattr(tokens, "__len__") and not len(tokens):
            raise ValueError(
                f"prompt {index} is empty; for text out of nothing, give the ids that begin one, "
                "as in tokenizer.begin."
            )
        tokens = np.asarray(token_ids(tokens, config.vocab_size, f"prompt {index}"))
        if len(tokens) + max_new_tokens > config.max_length:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens, and with max_new_tokens="
                f"{max_new_tokens} exceeds the model's max_length={config.max_length}; shorten the "
                "prompt or ask for fewer tokens."
            )
        rows.append(tokens.astype(np.int32))
    return rows


def _encoded(tokenizer, text, what):
    """The ids of a text, with those that begin one."""
    if tokenizer is None:
        raise ValueError(f"{what} is a text, and the model has no tokenizer; give token ids.")
    return [*tokenizer.begin, *tokenizer.encode(text)]


def prompt_keys(prompts: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """A random key for each prompt: the data of a threefry key, uint32 [B, 2].

    A key depends on the seed, on the prompt, and on how often the same prompt came before.

    Args:
      prompts: token ids of each, int32 [T].
      seed: 0 or more.
    """
    seen, keys = {}, []
    for tokens in prompts:
        prompt = zlib.crc32(tokens.tobytes())
        copy = seen[prompt] = seen.get(prompt, -1) + 1
        keys.append(np.random.SeedSequence([seed, prompt, copy]).generate_state(2))
    return np.stack(keys)


def stop_conditions(
    config: Config, tokenizer: Tokenizer | None, stop: str | int | Sequence[str | int]
) -> tuple[list[str], set[int]]:
    """Checks what stops a completion.

    Args:
      config: its vocab_size bounds the ids.
      tokenizer: what ends a text always stops a completion.
      stop: a text or a token id, or any number of them.

    Returns:
      The texts; the token ids, with those that end a text.

    Raises:
      ValueError: an empty text, or an id outside of the vocabulary.
      TypeError: something is neither a text nor a whole number.
    """
    one = isinstance(stop, str | int | np.integer)
    if not one and not isinstance(stop, list | tuple):
        raise TypeError(f"stop={stop!r}; it must be a text, a token id, or a list of them.")
    stop = [stop] if one else list(stop)
    texts = [x for x in stop if isinstance(x, str)]
    if "" in texts:
        raise ValueError("stop holds an empty text, which every text begins with; remove it.")
    for text in texts:
        require_utf8(text)
    tokens = [x for x in stop if not isinstance(x, str)]
    if tokens:
        tokens = np.asarray(token_ids(tokens, config.vocab_size, "stop")).tolist()
    if texts and tokenizer is None:
        raise ValueError("stop holds a text, and the model has no tokenizer; give token ids.")
    return texts, {*(tokenizer.ends if tokenizer else ()), *tokens}
