"""The files that a pattern matches, each of them once."""

import fnmatch
import glob
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Found(NamedTuple):
    """What a pattern matches.

    Attributes:
        root: the folder before the first wildcard of the pattern.
        files: the files, sorted; no two of them are the same file.
        left_out: how many other paths were met, by what they are.
    """

    root: Path
    files: list[Path]
    left_out: Counter[str]


def find_files(pattern: str) -> Found:
    """Finds the files that a glob pattern matches; `**` matches folders at any depth.

    Patterns mean what they mean to `glob.glob`, and a leading `~` is the home folder. Symbolic
    links are followed, but a file that several paths lead to is found once, by the shortest of
    them, and no folder is searched twice, so that a loop of links ends.
    """
    path = Path(os.path.expanduser(pattern))
    left_out = Counter()
    wild = next((n for n, part in enumerate(path.parts) if glob.has_magic(part)), None)
    if wild is None:
        root, matches = path.parent, [path] if path.is_file() else []
    else:
        root = Path(*path.parts[:wild])
        matches = set(_matches(root, path.parts[wild:], left_out))
    files = {}
    for match in sorted(matches, key=lambda match: (len(match.parts), match)):
        if files.setdefault(os.path.realpath(match), match) is not match:
            left_out["path to a file that is read under another name"] += 1
    return Found(root, sorted(files.values()), left_out)


def _matches(folder: Path, parts: Sequence[str], left_out: Counter[str]) -> Iterator[Path]:
    """The files whose path from a folder matches the parts of a pattern."""
    first, *rest = parts
    if first == "**":
        for below in _folders(folder, left_out):
            yield from _matches(below, rest or ["*"], left_out)
        return
    for path in _children(folder, first, left_out):
        if rest:
            yield from _matches(path, rest, left_out)
        elif path.is_file():
            yield path


def _folders(folder, left_out):
    """A folder and all those below it, the nearest first, each once."""
    searched, waiting = set(), deque([folder])
    while waiting:
        folder = waiting.popleft()
        real = os.path.realpath(folder)
        if real in searched:
            left_out["link to a folder that is read already"] += 1
            continue
        searched.add(real)
        yield folder
        below = [path for path in _children(folder, "*", left_out) if path.is_dir()]
        waiting += sorted(below, key=lambda path: (path.is_symlink(), path))


def _children(folder, pattern, left_out):
    """The paths in a folder whose name matches one part of a pattern."""
    if not glob.has_magic(pattern):
        return [folder / pattern]
    try:
        names = os.listdir(folder)
    except PermissionError:
        left_out["folder that may not be read"] += 1
        return []
    except (FileNotFoundError, NotADirectoryError):
        return []
    shown = [name for name in names if pattern.startswith(".") or not name.startswith(".")]
    return [folder / name for name in fnmatch.filter(shown, pattern)]
