"""Completions of prompts: the prompts run in chunks, then one token at a time, as a batch."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from transformer.checks import whole_number
from transformer.inference.completion import Completion, Piece, Writer
from transformer.inference.decode import MAX_STEPS
from transformer.inference.options import Options, takes_options
from transformer.inference.prompts import prompt_tokens, stop_conditions
from transformer.inference.rows import Rows
from transformer.inference.speculation import SpeculativeRows
from transformer.program.fit import check_params
from transformer.program.program import program


@takes_options
def generate(model, prompts: Sequence[str | Sequence[int]], **options) -> list[Completion]:
    """Completes prompts, as one batch in which each gets what it would get alone.

    The randomness of a completion comes from the seed, its prompt, and how often the same prompt
    came before in the batch: a prompt gives the same alone and in any batch, and repeated prompts
    give different samples.

    Args:
      model: config, params and tokenizer.
      prompts: each is a text, which begins a document, or token ids [T], taken as they are.
      **options: the fields of `Options`, of which max_new_tokens must be given. Ids that the
        tokenizer does not have are never drawn.

    Returns:
      One completion per prompt, in their order; with num_samples, so many of the first, then so
      many of the second.

    Raises:
      ValueError: no prompts, an empty prompt, ids outside of the vocabulary, a prompt that with its
        new tokens exceeds config.max_length, an option outside of its range, or parameters that do
        not belong to the config.
      TypeError: prompts is not a sequence of texts and ids, or an option has the wrong type.
      FloatingPointError: the model's logits are not finite.
    """
    pieces = stream(model, prompts, every=MAX_STEPS, **options)
    completions = {piece.index: piece.completion for piece in pieces if piece.completion}
    return [completions[index] for index in range(len(completions))]


@takes_options
def stream(
    model, prompts: Sequence[str | Sequence[int]], *, every: int = 1, **options
) -> Iterator[Piece]:
    """`generate`, piece by piece as the text comes.

    The pieces of one prompt, joined, are the text of its completion; text that may turn out to be
    the beginning of a stop text is held back until that is known.

    Args:
      model: as in `generate`.
      prompts: as in `generate`.
      **options: as in `generate`, and so are the errors, raised before anything runs.
      every: how many tokens run between two pieces of a text, 1 to MAX_STEPS: text comes sooner
        with fewer, and faster with more.
    """
    options = Options(**options)
    config, tokenizer = model.config, model.tokenizer
    check_params(config, model.params)
    own = program(config, numerics=options.numerics, attention=options.attention)
    f = options.program or own
    if whole_number("every", every, least=1) > MAX_STEPS:
        raise ValueError(f"every={every}; it must be between 1 and {MAX_STEPS}.")
    rows = prompt_tokens(config, tokenizer, prompts, options.max_new_tokens)
    rows = [row for row in rows for _ in range(options.num_samples)]
    stops = stop_conditions(config, tokenizer, options.stop)
    adjust = options.adjustments(config.vocab_size)
    return _stream(f, model, rows, stops, options, adjust, every)


def _stream(f, model, prompts, stops, options, adjust, every):
    longest = options.max_new_tokens
    writers = [Writer(model.tokenizer, *stops, longest) for _ in prompts]
    kind = SpeculativeRows if options.draft else Rows
    batch = kind(f, model, prompts, stops[1], options, adjust)
    waiting = deque(range(batch.size, len(prompts)))
    sequences = np.arange(batch.size)  # which of them each row runs
    running = np.ones(batch.size, bool)
    while running.any():
        left = min(longest - len(writers[n]) for n in sequences[running])
        # Where prompts are waiting, a row that stops is free at once.
        least = running.sum() if waiting else 1
        for row, drawn in batch.decode(running.copy(), min(every, left), least):
            if not running[row]:
                continue
            n = int(sequences[row])
            text, completion = writers[n].push(drawn), writers[n].completion
            running[row] = completion is None
            if text or completion:
                yield Piece(n, text, completion)
        for row in np.flatnonzero(~running)[: len(waiting)].tolist():
            sequences[row] = waiting.popleft()
            batch.put(row, sequences[row])
            running[row] = True
