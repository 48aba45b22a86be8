"""Small files that are there whole or not at all, and errors that say which file they are about."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where this project keeps what it can make again, in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "unison"


def write_json(path: Path, value) -> None:
    """Writes a value as JSON into a file, in one atomic step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8 into a file, in one atomic step.

    Raises:
      OSError: the file cannot be written; it is as it was before.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with naming(path):
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds a path to the system's errors that name none: that a disk is full, for one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
