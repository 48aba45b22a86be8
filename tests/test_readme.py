"""The README shows the code as it is, and what it shows runs."""

import re
from pathlib import Path

from transformer.program import layers

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_layer_is_shown_as_it_is():
    shown = next(block for block in BLOCKS if "def layer(" in block)
    functions = shown.split("\n\n\n")
    assert [f.split("(")[0] for f in functions] == ["def layer", "def project", "def combine"]
    source = Path(layers.__file__).read_text()
    assert all(f.strip() in source for f in functions)


def test_the_schedules_run():
    names = {}
    exec(next(block for block in BLOCKS if "init_cache(config" in block), names)
    assert names["logits"].shape == (100, names["config"].vocab_size)
