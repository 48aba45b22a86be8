"""What `generate` is given, checked: prompts and their random keys, and what stops a completion."""

import operator
import zlib
from collections.abc import Sequence

import numpy as np

from transformer.config import Config
from transformer.data.tokenizer import Tokenizer
from transformer.modes.schedule import check_tokens


def prompt_tokens(
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
) -> list[np.ndarray]:
    """Checks the prompts and returns the token ids of each, int32 [T].

    Args:
      config: its vocab_size bounds the ids, its max_length a prompt with its new tokens.
      tokenizer: encodes the texts; its end of a document comes before each.
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
            tokens = [tokenizer.end_of_document, *tokenizer.encode(prompt)] if prompt else []
        else:
            tokens = prompt
        try:
            tokens = np.asarray(tokens)
        except ValueError:  # lists of several lengths
            tokens = np.asarray([None])
        if not tokens.size:
            raise ValueError(
                f"prompt {index} is empty; for text out of nothing, give the ids "
                f"[tokenizer.end_of_document], which is [{tokenizer.end_of_document}]."
            )
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError(
                f"prompt {index} is {prompt!r}; a prompt is a text or a list of token ids, "
                "and prompts is a list of prompts."
            )
        _check_tokens(f"prompt {index}", tokens, config)
        if len(tokens) + max_new_tokens > config.max_length:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens, and with max_new_tokens="
                f"{max_new_tokens} exceeds the model's max_length={config.max_length}; shorten the "
                "prompt or ask for fewer tokens."
            )
        rows.append(tokens.astype(np.int32))
    return rows


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
    config: Config, tokenizer: Tokenizer, stop: str | int | Sequence[str | int]
) -> tuple[list[str], set[int]]:
    """Checks what stops a completion.

    Args:
      config: its vocab_size bounds the ids.
      tokenizer: its end of a document always stops a completion.
      stop: a text or a token id, or any number of them.

    Returns:
      The texts; the token ids, with the end of a document.

    Raises:
      ValueError: an empty text, or an id outside of the vocabulary.
      TypeError: something is neither a text nor a whole number.
    """
    if not isinstance(stop, str | int | list | tuple):
        raise ValueError(f"stop={stop!r}; it is a text, a token id, or a list of them.")
    stop = [stop] if isinstance(stop, str | int) else list(stop)
    texts = [x for x in stop if isinstance(x, str)]
    if "" in texts:
        raise ValueError("stop holds an empty text, which is everywhere; remove it.")
    tokens = [operator.index(x) for x in stop if not isinstance(x, str)]
    _check_tokens("stop", tokens, config)
    return texts, {tokenizer.end_of_document, *tokens}


def _check_tokens(place, tokens, config):
    try:
        check_tokens(tokens, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
