"""Documents, and how the text of a file becomes one or more of them."""

from typing import NamedTuple

# How a corpus of a single document is cut where nobody says how: into about so many pieces, unless
# they would be shorter than this.
PIECES, SHORTEST_PIECE = 100, 1000


class Document(NamedTuple):
    """A text and the name that identifies it in the corpus, a path relative to the corpus."""

    name: str
    text: str


def separated(document: Document, separator: str) -> list[Document]:
    """The documents that a separator divides a text into; it belongs to none of them."""
    return _numbered(document, document.text.split(separator))


def cut(document: Document, length: int) -> list[Document]:
    """Cuts a text into pieces of at most `length` characters, which joined are the text.

    A piece ends where a line ends, unless that would make it shorter than half the length.
    """
    text, pieces, start = document.text, [], 0
    while start < len(text):
        end = start + length
        if end < len(text):
            end = text.rfind("\n", start + length // 2, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return _numbered(document, pieces)


def default_length(document: Document) -> int:
    """The length to cut a document to that is the whole corpus, so that a part can be held out."""
    pieces = max(2, min(PIECES, len(document.text) // SHORTEST_PIECE))
    return -(-len(document.text) // pieces)


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 document, 2 documents, 1,000 documents."""
    first, *rest = noun.split(" ", 1)
    return " ".join([f"{number:,}", first if number == 1 else f"{first}s", *rest])


def _numbered(document, texts):
    texts = [text for text in texts if text]
    if len(texts) == 1:
        return [Document(document.name, texts[0])]
    return [Document(f"{document.name}:{n}", text) for n, text in enumerate(texts, 1)]
