"""Imports run one way: experiments, transformer, kernels; and from room to room of each."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = ["kernels", "transformer", "experiments"]
# From the ground up; a room imports itself and what lies lower, and no other room of its own floor.
FLOORS = [
    {"axes", "checks", "config", "files"},
    {"presets", "data"},
    {"numerics"},
    {"memory"},
    {"program"},
    {"modes"},
    {"training", "inference", "insight"},
    {"devices", "storage"},
]


@cache
def modules() -> dict[str, ast.Module]:
    """The source of every module, parsed, by its name."""
    paths = [path for house in HOUSES for path in (ROOT / house).rglob("*.py")]
    return {_name(path): ast.parse(path.read_text()) for path in sorted(paths)}


def _name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    """The names of what a module imports, anywhere in it: modules, or things in them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(tree: ast.Module) -> set[str]:
    """Which of this repository's modules a module imports."""
    found = {name if name in modules() else name.rpartition(".")[0] for name in imported(tree)}
    return found & set(modules())


def floor(module: str) -> int:
    """How high up in transformer/ a module lives."""
    room = module.split(".")[1]
    floors = [n for n, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"transformer/{room} is a room that this test does not know; give it a floor"
    return floors[0]


def test_experiments_import_transformer_and_transformer_imports_kernels():
    for name, tree in modules().items():
        house = name.split(".")[0]
        allowed = HOUSES[: HOUSES.index(house) + 1]
        upwards = {m for m in imported_modules(tree) if m.split(".")[0] not in allowed}
        assert not upwards, f"{name} imports {upwards}"


def test_rooms_import_lower_rooms():
    for name, tree in modules().items():
        if not name.startswith("transformer."):
            continue
        own = name.split(".")[1]
        others = {m for m in imported_modules(tree) if m.startswith("transformer.")}
        others = {m for m in others if m.split(".")[1] != own}
        upwards = {m for m in others if floor(m) >= floor(name)}
        assert not upwards, f"{name} imports {upwards}, which are not below it"


def test_no_imports_go_in_circles():
    try:
        TopologicalSorter({n: imported_modules(t) - {n} for n, t in modules().items()}).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("house", ["kernels", "transformer"])
def test_tests_of_the_library_need_no_experiments(house):
    for path in (ROOT / "tests" / house).rglob("*.py"):
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert "experiments" not in names, path


def test_every_module_and_everything_public_in_it_is_described():
    public = ast.FunctionDef, ast.ClassDef
    for name, tree in modules().items():
        if name.startswith("experiments"):
            continue
        found = [x for x in tree.body if isinstance(x, public) and not x.name.startswith("_")]
        assert not found or ast.get_docstring(tree), f"{name} has no docstring"
        # The docstring of a module is that of its `main`.
        silent = [x.name for x in found if x.name != "main" and not ast.get_docstring(x)]
        assert not silent, f"{name}: {silent} have no docstring"
