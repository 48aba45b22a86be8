"""A corpus: its documents, read from files, and split by document."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

# What lies beside the standard library's own source: tests (some deliberately broken or in other
# encodings), installed packages, and files generated for one machine.
_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED = ("config-", "_sysconfigdata")


class Document(NamedTuple):
    """A text and the name that identifies it in the corpus, a path relative to the corpus."""

    name: str
    text: str


def read_corpus(glob_pattern: str | None = None) -> list[Document]:
    """Reads the documents of a corpus, sorted by name; empty files are left out.

    Args:
        glob_pattern: the user's files, `**` for any depth of folders. Names are relative to the
            part of the pattern before its first wildcard. None reads the source of Python's own
            standard library without its tests; a file there that is not UTF-8 is left out.

    Raises:
        FileNotFoundError: the pattern matches no file.
        ValueError: a file of the user's is not UTF-8, or all files are empty.
    """
    documents = _standard_library() if glob_pattern is None else _matching_files(glob_pattern)
    documents = sorted(document for document in documents if document.text)
    if not documents:
        source = "the standard library" if glob_pattern is None else repr(glob_pattern)
        raise ValueError(f"the corpus is empty: no file of {source} holds any text")
    return documents


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _NOT_SOURCE and not name.startswith(_GENERATED)
        ]
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py" and not file.startswith(_GENERATED):
                try:
                    documents.append(_read(path, root))
                except UnicodeDecodeError:
                    continue
    return documents


def _matching_files(pattern: str) -> list[Document]:
    pattern = os.path.expanduser(pattern)
    paths = [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
    if not paths:
        raise FileNotFoundError(
            f"no file matches {pattern!r} (from {os.getcwd()}); ** matches folders at any depth, "
            "and the shell must not expand the pattern: quote it"
        )
    parts = Path(pattern).parts
    root = Path(*takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
    documents = []
    for path in paths:
        try:
            documents.append(_read(path, root))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; "
                "convert the file, or choose a pattern that leaves it out"
            ) from error
    return documents


def _read(path: Path, root: Path) -> Document:
    return Document(path.relative_to(root).as_posix(), path.read_bytes().decode("utf-8"))


def split(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits whole documents into (train, validation), in their order.

    A document's side depends on a hash of its own name alone, so adding or removing files never
    moves another one across.

    Args:
        documents: the corpus.
        validation_fraction: share of documents held out, in expectation; between 0 and 1.

    Raises:
        ValueError: the fraction is out of range, or one side would be empty.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; it must lie between 0 and 1"
        )
    sides = ([], [])
    for document in documents:
        digest = hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()
        held_out = int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
        sides[held_out].append(document)
    for name, side in zip(("training", "validation"), sides, strict=True):
        if not side:
            raise ValueError(
                f"no document is left for {name}: {len(documents)} documents with "
                f"validation_fraction {validation_fraction}. Documents are held out whole, so "
                "give more files or another fraction"
            )
    return sides
