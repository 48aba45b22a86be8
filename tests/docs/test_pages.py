"""What the pages of docs/ show: every example runs, and every public name is in the reference."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import transformer
from transformer.memory.rules import Rule

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# A block of Python, and what it prints where a block of text follows.
EXAMPLE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    """From top to bottom, as in one file; lines may be broken elsewhere than in what is shown."""
    names = {}
    for code, shown in EXAMPLE.findall(page.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "example.py", "exec"), names)
        if shown:
            assert printed.getvalue().split() == shown.split()


def test_every_public_name_is_in_the_reference():
    reference = (DOCS / "api.md").read_text()
    described = re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)", reference, re.MULTILINE)
    assert set(transformer.__all__) <= set(described)
    assert "kernels.attention" in described


def test_every_rule_of_the_contract_is_described():
    page = (DOCS / "contract.md").read_text()
    assert not [rule for rule in Rule if f"\n| {rule} |" not in page]
