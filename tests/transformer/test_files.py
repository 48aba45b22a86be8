"""Small files: whole or not at all, and named in errors."""

import errno
import json
from pathlib import Path

import pytest

from transformer.files import naming, write_json, write_text


def test_a_file_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1, None]}
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_is_as_before_and_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_that_names_a_file_keeps_it():
    with pytest.raises(FileNotFoundError, match="'/nowhere/file'"), naming(Path("other")):
        Path("/nowhere/file").read_text()
    with pytest.raises(TimeoutError, match=r"^no number$"), naming(Path("other")):
        raise TimeoutError("no number")
