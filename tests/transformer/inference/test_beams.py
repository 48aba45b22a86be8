"""Beam search against that of transformers."""

from pathlib import Path

import numpy as np
import pytest

from transformer import load
from transformer.inference.beams import beam_search

LLAMA = Path(__file__).parents[1] / "storage" / "formats" / "fixtures" / "llama"
ENDS = [24, 37]


@pytest.fixture(scope="module")
def reference():
    """Completions [B, T], filled up, and their scores [B], by "tokens 0.5 0" and the like."""
    with np.load(Path(__file__).parent / "fixtures" / "beams.npz") as arrays:
        return dict(arrays)


def test_beams_are_those_of_transformers(reference):
    model, ended = load(LLAMA), 0
    for penalty in (0.5, 2.0):
        for n, prompt in enumerate(reference["prompts"]):
            completions = beam_search(
                model, prompt, num_beams=4, max_new_tokens=10, length_penalty=penalty, stop=ENDS
            )
            scores = [sum(x.logprobs) / len(x.tokens) ** penalty for x in completions]
            # Sums of ten float32 numbers.
            np.testing.assert_allclose(scores, reference[f"scores {penalty} {n}"], rtol=1e-5)
            for completion, row in zip(
                completions, reference[f"tokens {penalty} {n}"], strict=True
            ):
                length = len(completion.tokens)
                assert completion.tokens == row[:length].tolist()
                assert (completion.finish_reason == "stop") == (completion.tokens[-1] in ENDS)
                assert completion.finish_reason == "stop" or length == 10
                ended += completion.finish_reason == "stop"
    assert ended


def test_what_does_not_fit_is_refused():
    model = load(LLAMA)
    with pytest.raises(ValueError, match="num_beams=0; it must be at least 1"):
        beam_search(model, [1], max_new_tokens=2, num_beams=0)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        beam_search(model, [1], max_new_tokens=2, num_beams=2, stop="a")
