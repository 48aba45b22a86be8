"""Splitting a corpus into training and validation, by document."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.data.corpus import read_corpus
from transformer.data.documents import Document
from transformer.data.split import split

# Few texts, so that copies are frequent.
corpora = st.lists(
    st.tuples(st.text(max_size=3), st.sampled_from("abcdefgh")), unique_by=lambda d: d[0]
)
corpora = corpora.map(lambda pairs: [Document(*pair) for pair in pairs]).filter(
    lambda documents: len({document.text for document in documents}) > 1
)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(documents=corpora, fraction=fractions)
def test_both_sides_have_documents_and_no_text_is_on_both(documents, fraction):
    training, validation = split(documents, fraction)
    assert training and validation
    assert sorted(training + validation) == sorted(documents)
    assert not {document.text for document in training} & {document.text for document in validation}
    assert training == [document for document in documents if document in training]


@given(documents=corpora, fraction=fractions)
def test_the_order_does_not_matter(documents, fraction):
    sides = [sorted(side) for side in split(documents, fraction)]
    assert [sorted(side) for side in split(documents[::-1], fraction)] == sides


def test_adding_documents_moves_no_other():
    # Names of the standard library, but a text for each: copies follow the first of their names.
    corpus = [Document(name, name) for name, _ in read_corpus()]
    training, validation = split(corpus, 0.1)
    # Binomial: 0.1 of about 700 has a standard deviation of 0.011, and the names are fixed.
    assert 0.05 < len(validation) / len(corpus) < 0.15
    fewer_training, fewer_validation = split(corpus[::2], 0.1)
    assert set(fewer_training) <= set(training)
    assert set(fewer_validation) <= set(validation)


def test_a_hash_that_falls_on_one_side_for_all_still_gives_both():
    """Forty files, of which the hash would hold out none in one corpus of eight."""
    for n in range(50):
        documents = [Document(f"{n}/{m}", f"{n} {m}") for m in range(40)]
        training, validation = split(documents, 0.05)
        assert validation and len(training) > 30


def test_impossible_splits_get_clear_errors():
    two = [Document("a", "abc"), Document("b", "def")]
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"validation_fraction=.* between 0 and 1"):
            split(two, fraction)
    with pytest.raises(ValueError, match="the corpus is 1 document, and documents are held out"):
        split(two[:1], 0.5)
    with pytest.raises(ValueError, match="the corpus is 3 documents, all of the same text"):
        split([Document(name, "abc") for name in "abc"], 0.5)
