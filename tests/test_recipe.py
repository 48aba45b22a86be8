"""The README's way to change the layer, applied literally to a copy of the repository."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("transformer", "kernels", "experiments", "tests")
FILES = ("README.md", "setup.cfg", "pyproject.toml")
README = (ROOT / "README.md").read_text()
SECTION = README.partition("\n## Change the layer\n")[2].partition("\n## ")[0]
FILE = re.search(r"`(transformer/program/\w+\.py)`", SECTION)[1]
SHOWN = dict(re.findall(r"^```(\w*)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL))
MODULE, CHANGES, COMMANDS = SHOWN["python"], SHOWN["diff"], SHOWN[""]
# Tests of what a kind of layer touches: the config, the layers and what they cost, the house.
AFFECTED = (
    "tests/test_architecture.py",
    "tests/test_readme.py::test_the_layer_is_shown_as_it_is",
    "tests/transformer/test_config.py",
    "tests/transformer/training/test_flops.py",
)
SMALL = {
    "experiments.train": [
        "--config.model.num_layers=1",
        "--config.data.path=transformer/**/*.py",
        "--config.data.length=16",
        "--config.train.steps=4",
        "--config.optimizer.warmup_steps=1",
        "--config.train.sample_length=4",
    ],
    "experiments.sample": ["--max_new_tokens=4"],
    "experiments.equivalence": ["--length=20", "--ways=sequential,batched", "--json"],
}


def apply(changes: str, root: Path):
    """Applies a diff: each line that begins with - is in the file once, and gives way to the +."""
    for file in re.split(r"^--- ", changes, flags=re.MULTILINE)[1:]:
        name, *lines = file.splitlines()
        text = (root / name).read_text()
        for old, new in zip(lines[::2], lines[1::2], strict=True):
            assert old[0] == "-" and new[0] == "+" and text.count(f"\n{old[1:]}\n") == 1
            text = text.replace(f"\n{old[1:]}\n", f"\n{new[1:]}\n")
        (root / name).write_text(text)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the repository with the recipe applied."""
    root = tmp_path_factory.mktemp("changed")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, root / file)
    (root / FILE).write_text(MODULE)
    apply(CHANGES, root)
    return root


def run(root, *command):
    """Runs Python in the copy; its folder comes before the one that is installed."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    result = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True
    )
    assert not result.returncode, result.stdout + result.stderr
    return result.stdout


def test_the_recipe_is_20_lines_of_code():
    """Docstrings and blank lines do not count; the lines that the diff changes do."""
    code = ast.unparse(_without_docstrings(ast.parse(MODULE))).split("\n")
    assert sum(map(bool, code)) + CHANGES.count("\n+") <= 20


def _without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return tree


def test_the_commands_run_and_all_ways_agree(changed):
    for line in COMMANDS.replace("\\\n", "").splitlines():
        python, *command = shlex.split(line)
        assert python == "python"
        printed = run(changed, *command, *SMALL[command[1]])
    rows = [json.loads(row) for row in printed.splitlines()]
    assert [row["way"] for row in rows] == ["parallel", "sequential", "batched"]
    for row in rows:
        # As in the tests of the built-in layers: float32, summed in another order.
        assert row["logit_difference"] < 2e-5
        assert row["gradient_difference"] is None or row["gradient_difference"] < 1e-4


def test_the_affected_tests_pass(changed):
    options = "-q", "-n", "0", "-p", "no:cacheprovider"
    assert "passed" in run(changed, "-m", "pytest", *options, *AFFECTED)
    assert "All checks passed" in run(changed, "-m", "ruff", "check", FILE)
    run(changed, "-m", "ruff", "format", "--check", FILE)
