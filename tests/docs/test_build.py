"""The pages are built without a warning, and load nothing from elsewhere when they are read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx_book_theme", reason="the docs extra is not installed: make docs")

DOCS = Path(__file__).parents[2] / "docs"
# What a browser fetches by itself, in pages and in style sheets; a link is not among it.
_ADDRESS = r"""["']?(?:\w+:)?//"""
FETCHED = re.compile(rf"(?:<(?:script|img|iframe)[^>]*\ssrc=|<link[^>]*\shref=|url\(){_ADDRESS}")


def test_pages_are_whole_and_load_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    subprocess.run(command, check=True)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".css")]
    assert tmp_path / "api.html" in files
    assert not [path for path in files if FETCHED.search(path.read_text())]
