"""A corpus divided into what is trained on and what is held out."""

import hashlib
from collections.abc import Sequence

from transformer.data.documents import Document, counted


def split(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits whole documents into (training, validation), in their order.

    A document's side depends on a hash of its name alone, so adding or removing files never moves
    another one across, with two exceptions: documents of equal text are all where the first of
    their names is, and where a side would be empty, it gets the text whose hash comes nearest.

    Args:
        documents: the corpus.
        validation_fraction: share of the texts that is held out, in expectation; between 0 and 1.

    Raises:
        ValueError: the fraction is out of range, or there are not two different texts.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}; it must lie between 0 and 1.")
    places = {}
    for document in sorted(documents):
        places.setdefault(document.text, _place(document.name))
    if len(places) < 2:
        same = "" if len(documents) < 2 else ", all of the same text"
        raise ValueError(
            f"the corpus is {counted(len(documents), 'document')}{same}, and documents are held "
            "out whole: at least two different ones are needed, to train on and to validate with."
        )
    by_place = sorted(places, key=places.get)
    number = sum(place < validation_fraction for place in places.values())
    held_out = set(by_place[: min(max(number, 1), len(by_place) - 1)])
    sides = ([], [])
    for document in documents:
        sides[document.text in held_out].append(document)
    return sides


def _place(name):
    """A number from 0 up to 1 that a name always has, as if drawn at random."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
