"""A corpus: its documents, read from files."""

import logging
import os
import sysconfig
from pathlib import Path

from transformer.data.documents import Document, counted, cut, separated
from transformer.data.paths import find_files

# What lies beside the standard library's own source: tests (some deliberately broken or in other
# encodings), installed packages, and files generated for one machine.
_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_GENERATED = ("config-", "_sysconfigdata")

_log = logging.getLogger(__name__)


def read_corpus(
    glob_pattern: str | None = None,
    separator: str | None = None,
    document_length: int | None = None,
) -> list[Document]:
    """Reads the documents of a corpus, sorted by name.

    A warning is logged of what is left out, such as files without text.

    Args:
        glob_pattern: the user's files, `**` for any depth of folders. Names are relative to the
            part of the pattern before its first wildcard. None reads the source of Python's own
            standard library without its tests; a file there that is not UTF-8 is left out.
        separator: the text that stands between the documents of a file; None: a file is a document.
        document_length: longer documents are cut into pieces of at most so many characters, at the
            ends of lines where there are any; None: they are left as they are.

    Raises:
        FileNotFoundError: the pattern matches no file.
        ValueError: a file of the user's is not UTF-8, all files are empty, the separator stands in
            none of them, or an argument is out of its range.
    """
    if separator == "":
        raise ValueError("separator=''; it must be a text, or None where files are documents.")
    if document_length is not None and document_length < 1:
        raise ValueError(f"document_length={document_length}; it must be at least 1, or None.")
    if glob_pattern is None:
        source, files = "the standard library", _standard_library()
    else:
        source, files = repr(glob_pattern), _matching_files(glob_pattern)
    documents = [document for document in files if document.text]
    if not documents:
        raise ValueError(f"the corpus is empty: no file of {source} holds any text.")
    if separator is not None:
        if not any(separator in document.text for document in documents):
            raise ValueError(
                f"separator={separator!r} stands in no file of {source}; a line break on the "
                "command line is written as $'\\n'."
            )
        documents = [part for document in documents for part in separated(document, separator)]
    if document_length is not None:
        documents = [piece for document in documents for piece in cut(document, document_length)]
    return sorted(documents)


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
    root, files, left_out = find_files(pattern)
    if not files:
        raise FileNotFoundError(
            f"no file matches {pattern!r} (from {os.getcwd()}); ** matches folders at any depth, "
            "and the shell must not expand the pattern: quote it."
        )
    documents = []
    for path in files:
        try:
            documents.append(_read(path, root))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; "
                "convert the file, or choose a pattern that leaves it out."
            ) from error
    left_out["file without text"] += sum(not document.text for document in documents)
    kinds = [counted(number, kind) for kind, number in left_out.items() if number]
    if kinds:
        _log.warning("left out of the corpus %r: %s", pattern, ", ".join(kinds))
    return documents


def _read(path: Path, root: Path) -> Document:
    return Document(path.relative_to(root).as_posix(), path.read_bytes().decode("utf-8"))
