"""What people give as prompts and as stops: taken, or refused with a sentence."""

import numpy as np
import pytest

from transformer.config import Config
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.prompts import prompt_keys, prompt_tokens, stop_conditions

TOKENIZER = byte_tokenizer()
END = TOKENIZER.end_of_document
CONFIG = Config(vocab_size=300, max_length=16, num_layers=1, width=8, num_heads=2)


def tokens(prompts, max_new_tokens=4):
    return [row.tolist() for row in prompt_tokens(CONFIG, TOKENIZER, prompts, max_new_tokens)]


def test_texts_begin_a_document_and_ids_are_taken_as_they_are():
    assert tokens(["ab", [5, 6], np.array([7])]) == [[END, 97, 98], [5, 6], [7]]


@pytest.mark.parametrize(
    "prompts, kind, message",
    [
        ("text", TypeError, "list of prompts"),
        (3, TypeError, "list of prompts"),
        ([], ValueError, "at least one prompt"),
        ([""], ValueError, r"prompt 0 is empty.*tokenizer\.begin"),
        (["a", []], ValueError, "prompt 1 is empty"),
        ([[1, 300]], ValueError, "prompt 0: token id 300 at 1 is outside"),
        ([[-1]], ValueError, "token id -1"),
        ([[0.5]], TypeError, "prompt 0 must be integers, and hold float64"),
        ([[[1, 2]]], ValueError, r"prompt 0 must have the shape \[T\]"),
        ([[[1], [2, 3]]], TypeError, "prompt 0 must be one list of token ids"),
        ([3, 4], ValueError, r"prompt 0 must have the shape \[T\]"),
        (["a" * 13], ValueError, "14 tokens.*max_new_tokens=4.*max_length=16"),
    ],
)
def test_other_prompts_are_refused(prompts, kind, message):
    with pytest.raises(kind, match=message):
        tokens(prompts)


def test_a_key_depends_on_the_seed_the_prompt_and_its_copies():
    a, b = np.array([1, 2], np.int32), np.array([3], np.int32)
    keys = prompt_keys([a, b, a], 7)
    assert len({tuple(key) for key in keys}) == 3
    np.testing.assert_array_equal(prompt_keys([a], 7)[0], keys[0])
    np.testing.assert_array_equal(prompt_keys([b, a], 7), keys[[1, 0]])
    assert not np.array_equal(prompt_keys([a], 8)[0], keys[0])


def test_stops_are_texts_and_ids_alone_or_in_a_list():
    conditions = lambda stop: stop_conditions(CONFIG, TOKENIZER, stop)
    assert conditions(()) == ([], {END})
    assert conditions("x") == (["x"], {END})
    for one in (5, np.int64(5), [5], [np.int32(5)], (5, 5)):
        assert conditions(one) == ([], {5, END})
    assert conditions(["x", 5, "yz"]) == (["x", "yz"], {5, END})


@pytest.mark.parametrize(
    "stop, kind, message",
    [
        ("", ValueError, "an empty text, which every text begins with"),
        (b"x", TypeError, "it must be a text, a token id, or a list of them"),
        ([300], ValueError, "stop: token id 300"),
        ([0.5], TypeError, "stop must be integers"),
        (["a\ud800"], ValueError, "half of a surrogate pair"),
    ],
)
def test_other_stops_are_refused(stop, kind, message):
    with pytest.raises(kind, match=message):
        stop_conditions(CONFIG, TOKENIZER, stop)
