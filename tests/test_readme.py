"""The README shows the code as it is, and what it shows runs."""

import re
from pathlib import Path

import jax
import pytest

from transformer import Model, init_params, presets, save
from transformer.data.tokenizer import byte_tokenizer
from transformer.program import attention, layers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHOWN = {  # functions of the repository
    layers: ("def layer(", "def combine("),
    attention: ("def mix(spec: LayerSpec", "def project("),
}


@pytest.mark.parametrize("module", SHOWN, ids=lambda module: module.__name__)
def test_the_layer_is_shown_as_it_is(module):
    shown = next(block for block in BLOCKS if SHOWN[module][0] in block)
    functions = shown.split("\n\n\n")
    assert len(functions) == len(SHOWN[module])
    source = Path(module.__file__).read_text()
    for function, begins in zip(functions, SHOWN[module], strict=True):
        assert begins in function and function.strip() in source


def test_the_rest_runs(tmp_path, monkeypatch):
    """From top to bottom, with a model in place of the one that `make demo` has trained."""
    config = presets["tiny"]
    model = Model(config, init_params(config, jax.random.key(0)), byte_tokenizer())
    save(model, tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        if not any(functions[0] in block for functions in SHOWN.values()):
            exec(compile(block, "example.py", "exec"), names)


def test_links_lead_somewhere_and_every_room_is_named():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert not [link for link in links if not (ROOT / link).exists()]
    named = README.partition("\n## Where things are\n")[2]
    rooms = {
        path.name for path in (ROOT / "transformer").iterdir() if (path / "__init__.py").exists()
    }
    assert not [room for room in rooms if f"{room}/`" not in named]
