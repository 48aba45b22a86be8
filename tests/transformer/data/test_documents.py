"""Cutting a text into documents."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.data.documents import Document, counted, cut, default_length, separated

texts = st.text(st.sampled_from("ab\n"), min_size=1, max_size=60)


@given(text=texts, length=st.integers(1, 20))
def test_pieces_joined_are_the_text(text, length):
    pieces = cut(Document("name", text), length)
    assert "".join(piece.text for piece in pieces) == text
    assert all(1 <= len(piece.text) <= length for piece in pieces)
    assert len({piece.name for piece in pieces}) == len(pieces)
    for piece in pieces[:-1]:
        # At the last end of a line, where one lies in the second half.
        assert piece.text.endswith("\n") or "\n" not in piece.text[length // 2 :]
        assert len(piece.text) > length // 2


@given(text=st.text(min_size=2, max_size=300))
def test_by_default_there_are_at_least_two_pieces(text):
    document = Document("name", text)
    assert len(cut(document, default_length(document))) >= 2


def test_by_default_there_are_about_100_pieces_of_a_long_text():
    document = Document("name", "line\n" * 200_000)
    assert 100 <= len(cut(document, default_length(document))) <= 102
    document = Document("name", "line\n" * 2_000)
    assert len(cut(document, default_length(document))) <= 11


def test_a_separator_belongs_to_no_document():
    assert separated(Document("x", "one--two----three--"), "--") == [
        ("x:1", "one"),
        ("x:2", "two"),
        ("x:3", "three"),
    ]
    assert separated(Document("x", "one--"), "--") == [("x", "one")]


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "document", "1 document"),
        (2, "document", "2 documents"),
        (0, "link to a folder", "0 links to a folder"),
        (1234, "file", "1,234 files"),
    ],
)
def test_numbers_with_their_nouns(number, noun, text):
    assert counted(number, noun) == text
