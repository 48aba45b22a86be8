"""Finding the files of a pattern, each once, whatever links there are."""

import glob
import os

import pytest

from transformer.data.paths import find_files


@pytest.fixture
def tree(tmp_path):
    """Six files, two of them hidden, in three folders."""
    for name in ("a.txt", "b.md", "one/c.txt", "one/two/d.txt", "one/.e.txt", ".hidden/f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def found(pattern):
    return [str(path) for path in find_files(str(pattern)).files]


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "**/*", "*.txt", "**/*.txt", "*/*.txt", "one/**/*.txt", "**/two/*", "o*/t?o/[c-d]*",
     "**/.e*", "**/**/d.txt", "a.txt", "one", "*/two", ".*/*", "nothing/*", "a.txt/*", "**/a.*"],
)  # fmt: skip
def test_without_links_it_is_what_glob_finds(tree, pattern):
    expected = filter(os.path.isfile, glob.glob(f"{tree}/{pattern}", recursive=True))
    assert found(tree / pattern) == sorted(set(expected))


def test_relative_patterns(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert found("**/*.txt") == ["a.txt", "one/c.txt", "one/two/d.txt"]
    assert found("./a.txt") == ["a.txt"]
    monkeypatch.setenv("HOME", str(tree))
    assert found("~/*.txt") == [str(tree / "a.txt")]


def test_loops_of_links_end(tree):
    before = found(tree / "**/*.txt")
    # With two of them, `glob.glob` meets 2**40 paths.
    (tree / "loop").symlink_to(tree)
    (tree / "one" / "loop").symlink_to(tree)
    assert found(tree / "**/*.txt") == before
    left_out = find_files(f"{tree}/**/*.txt").left_out
    assert left_out == {"link to a folder that is read already": 2}


def test_links_are_followed_and_a_file_is_found_by_its_shortest_path(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "g.txt").write_text("g")
    (tree / "one" / "outside").symlink_to(outside)
    (tree / "one" / "two" / "again.txt").symlink_to(tree / "a.txt")
    (tree / "z.txt").symlink_to(outside / "g.txt")
    (tree / "broken.txt").symlink_to(tree / "nothing")
    names = ("a.txt", "one/c.txt", "one/two/d.txt", "z.txt")
    assert found(tree / "**/*.txt") == [str(tree / name) for name in names]
    left_out = find_files(f"{tree}/**/*.txt").left_out
    assert left_out == {"path to a file that is read under another name": 2}


def test_a_folder_that_may_not_be_read_is_counted(tree, monkeypatch):
    listdir = os.listdir

    def refuse(path):
        if path.name == "two":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    found = find_files(f"{tree}/**/*.txt")
    assert [path.name for path in found.files] == ["a.txt", "c.txt"]
    assert found.left_out == {"folder that may not be read": 2}
