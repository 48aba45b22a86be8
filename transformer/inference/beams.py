"""Beam search: the likeliest completions that a search of limited width finds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from transformer.checks import whole_number
from transformer.inference.completion import Completion, Writer
from transformer.inference.decode import capacity_for
from transformer.inference.drawn import Drawn
from transformer.inference.prefill import Prefill
from transformer.inference.prepare import cast_params, lay_out_params
from transformer.inference.prompts import prompt_tokens, stop_conditions
from transformer.inference.sampling import keep_below
from transformer.numerics.numerics import numerics_of
from transformer.program.fit import check_params
from transformer.program.program import program


@dataclass(frozen=True)
class _Beam:
    """A completion on its way: new tokens, their log-probabilities, and the sum of these."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0

    def extended(self, token, logprob, total):
        return _Beam((*self.tokens, token), (*self.logprobs, logprob), total)

    def score(self, length_penalty):
        return self.total / len(self.tokens) ** length_penalty


def beam_search(
    model,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    stop: int | Sequence[int] = (),
    numerics: str = "fast",
    attention: str = "auto",
) -> list[Completion]:
    """Searches for the completions with the highest score, as transformers does.

    Of `num_beams` beginnings, each with all tokens that may follow, the likeliest `num_beams` go
    on, until so many have ended and none that goes on has a higher score.

    Args:
      model, prompt, max_new_tokens, numerics, attention: as in `generate`.
      num_beams: how many beginnings there are at a time, at least 1.
      length_penalty: a completion's score is the sum of its log-probabilities over its number of
        tokens to this power; above 0 favours long ones.
      stop: token ids that end a completion, besides the end of a text.

    Returns:
      At most `num_beams` completions, the one with the highest score first.

    Raises:
      ValueError, TypeError: as in `generate`.
      FloatingPointError: the model's logits are not finite.
    """
    config, tokenizer = model.config, model.tokenizer
    num_beams = whole_number("num_beams", num_beams, least=1)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    check_params(config, model.params)
    f = program(config, numerics=numerics, attention=attention)
    [prompt] = prompt_tokens(config, tokenizer, [prompt], max_new_tokens)
    texts, stops = stop_conditions(config, tokenizer, stop)
    if texts:
        raise ValueError("a beam ends with a token; give token ids in stop, and no texts.")
    params = cast_params(config, model.params)
    prefill = Prefill(config, f, params, capacity_for(len(prompt) + max_new_tokens), [prompt])
    cache = prefill([prompt] * num_beams)
    params = lay_out_params(f, params)
    vocab_size = np.int32(tokenizer.vocab_size if tokenizer else config.vocab_size)
    parents, tokens = np.arange(num_beams), np.full(num_beams, prompt[-1], np.int32)
    # All beams are the prompt, so only the first may go on.
    beams, ended = [_Beam(), *[_Beam(total=-np.inf)] * (num_beams - 1)], []
    for step in range(max_new_tokens):
        totals = np.array([beam.total for beam in beams], np.float32)
        i = np.int32(len(prompt) - 1 + step)
        cache, *found = _step(f, params, cache, parents, tokens, i, totals, vocab_size)
        beams, parents, new = _choose(beams, *map(np.asarray, found), stops)
        tokens = np.array([beam.tokens[-1] for beam in beams], np.int32)
        ended = sorted(ended + new, key=lambda beam: -beam.score(length_penalty))[:num_beams]
        full = len(ended) == num_beams
        if full and beams[0].score(length_penalty) <= ended[-1].score(length_penalty):
            break
    else:
        ended = sorted(ended + beams, key=lambda beam: -beam.score(length_penalty))[:num_beams]
    return [_completion(tokenizer, beam, stops, max_new_tokens) for beam in ended]


def _choose(beams, totals, parents, tokens, logprobs, stops):
    """Of the likeliest [2 * num_beams] those that go on, their parents, and those that ended."""
    go_on, rows, ended = [], [], []
    for rank, found in enumerate(zip(parents, tokens, logprobs, totals, strict=True)):
        parent, token, logprob, total = (x.item() for x in found)
        beam = beams[parent].extended(token, logprob, total)
        if token not in stops and len(go_on) < len(beams):
            go_on.append(beam)
            rows.append(parent)
        elif token in stops and rank < len(beams):
            ended.append(beam)
    return go_on, np.array(rows), ended


def _completion(tokenizer, beam, stops, max_new_tokens):
    writer = Writer(tokenizer, (), stops, max_new_tokens)
    for token, logprob in zip(beam.tokens, beam.logprobs, strict=True):
        writer.push(Drawn(np.int32(token), np.float32(logprob)))
    return writer.completion


@partial(jax.jit, static_argnames="f", donate_argnames="cache")
def _step(f, params, cache, parents, tokens, i, totals, vocab_size):
    """One step of all beams [B], each going on from the row of its parent.

    Returns:
      The cache; and for the likeliest 2 * B tokens of all: the sums of log-probabilities, the rows
      that they follow, the tokens, and their own log-probabilities.
    """
    cache = jax.tree.map(lambda x: x[parents], cache)
    cache, logits = jax.vmap(f, (None, 0, 0, None))(params, cache, tokens, i)
    logprobs = logits - numerics_of(f).log_sum_exp(logits)[:, None]
    usable = jax.vmap(keep_below, (0, None))(logprobs, vocab_size)
    found, at = jax.lax.top_k((totals[:, None] + usable).reshape(-1), 2 * len(tokens))
    rows, ids = at // logits.shape[1], at % logits.shape[1]
    return cache, found, rows, ids.astype(jnp.int32), logprobs[rows, ids]
