"""The README shows the code as it is, and what it shows runs."""

import inspect
import re
from pathlib import Path

from transformer import layers

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_layer_is_shown_in_full():
    shown = next(block for block in BLOCKS if "def layer(" in block)
    real = [inspect.getsource(f) for f in (layers.layer, layers.project, layers.combine)]
    assert shown == "\n\n".join(real)


def test_the_schedules_run():
    names = {}
    exec(next(block for block in BLOCKS if "init_cache(config" in block), names)
    assert names["logits"].shape == (100, names["config"].vocab_size)
