"""The notebook runs from its first cell to its last, in a fresh kernel, as people run it."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def printed():
    """What the cells have printed; a cell with an error is an error here."""
    notebook = nbformat.read(FOLDER / "unison.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear its outputs, please"
    [training] = [cell for cell in notebook.cells if "STEPS = 16, 64, 300\n" in cell.source]
    training.source = training.source.replace("STEPS = 16, 64, 300\n", "STEPS = 16, 64, 150\n")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    # Compiled as people compile it: what the other tests save by XLA_FLAGS, training would lose.
    client.execute(env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "\n".join(x.get("text") or x["data"]["text/plain"] for x in outputs)


def test_the_program_is_lawful_and_the_other_one_is_not(printed):
    assert "[4, 4, 4]" in printed  # the depth, for any length
    assert printed.index("lawful: every rule of the contract holds") < printed.index("unlawful: 1")


def test_it_learns(printed):
    """Here in half of its steps.

    A uniform guess among 128 characters takes 7 bits, single characters of code about 4.5.
    """
    line = next(x for x in printed.splitlines() if x.startswith("bits per character: "))
    bits = [float(x) for x in line.removeprefix("bits per character: ").split(", ")]
    assert bits[-1] < 3.5
