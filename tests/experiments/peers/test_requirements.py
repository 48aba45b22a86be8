"""What the peers need is listed."""

import ast
import re
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[3] / "experiments" / "peers"
# Where the name of the import is not that of the package.
PACKAGES = {"absl": "absl-py", "llama_cpp": "llama-cpp-python"}


@pytest.mark.parametrize("path", sorted(PEERS.glob("*.py")), ids=lambda path: path.stem)
def test_all_that_a_peer_imports_is_listed(path):
    listed = re.findall(r"^([\w-]+)", (PEERS / "requirements.txt").read_text(), re.MULTILINE)
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    imported -= sys.stdlib_module_names | {path.stem for path in PEERS.glob("*.py")}
    assert {PACKAGES.get(name, name) for name in imported} <= set(listed)
