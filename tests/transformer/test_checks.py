"""What people give: whole numbers and token ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.checks import token_ids, whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.int8(3), jnp.int32(3), np.array(3)])
def test_whole_numbers_of_any_library_become_ints(value):
    number = whole_number("chunk", value)
    assert number == 3 and type(number) is int


@pytest.mark.parametrize("value", [1.0, "1", None, np.float32(1), [1], jnp.ones(2, int)])
def test_what_is_not_a_whole_number_is_named_with_its_type(value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"chunk=.* is of type {kind}; it must be a whole number"):
        whole_number("chunk", value)


def test_a_number_below_the_least_is_refused():
    assert whole_number("chunk", 1, least=1) == 1
    with pytest.raises(ValueError, match="chunk=0; it must be at least 1"):
        whole_number("chunk", 0, least=1)


@pytest.mark.parametrize("tokens", [[0, 4], (0, 4), np.array([0, 4], np.uint8), jnp.array([0, 4])])
def test_token_ids_come_as_lists_or_arrays(tokens):
    assert token_ids(tokens, 5).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0, 61], ValueError, "token id 61 at 1 is outside of the vocabulary, 0 to 60"),
        ([3, -1], ValueError, "token id -1 at 1"),
        (np.array([2**32 + 5]), ValueError, "token id 4294967301 at 0"),  # 5 in 32 bits
        ([True, False], TypeError, "tokens must be integers, and hold bool"),
        ([1.0], TypeError, "tokens must be integers, and hold float64"),
        (["a"], TypeError, "tokens must be integers"),
        ([[1], [1, 2]], TypeError, "tokens must be one list of token ids"),
        ([], ValueError, r"at least one token, and have the shape \[0\]"),
        ([[1, 2]], ValueError, r"have the shape \[1, 2\]; use jax.vmap for a batch"),
        (3, ValueError, r"have the shape \[\]"),
    ],
)
def test_what_is_not_a_sequence_of_ids_is_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        token_ids(tokens, 61)


def test_the_message_says_what_the_tokens_are():
    with pytest.raises(ValueError, match="prompt 2: token id 9 at 0"):
        token_ids([9], 9, "prompt 2")


def test_ids_that_are_not_known_yet_pass():
    assert jax.jit(lambda tokens: token_ids(tokens, 5))(jnp.array([7])).tolist() == [7]
    assert token_ids([7]).tolist() == [7]  # a vocabulary that is not known
