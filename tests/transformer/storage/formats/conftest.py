"""Published models, small and random, that the tests of formats read; see make_fixtures.py."""

import json
from pathlib import Path

import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


@pytest.fixture(params=NAMES)
def published(request) -> Path:
    """The directory of each published model."""
    return FIXTURES / request.param


@pytest.fixture
def published_named():
    """published_named(name) is the directory of one published model."""
    return lambda name: FIXTURES / name


@pytest.fixture
def llama(tmp_path) -> Path:
    """A copy of one published model, to be changed."""
    for path in (FIXTURES / "llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def reference():
    """reference(directory) gives tokens [T], logits [T, V] and greedy ids by transformers."""

    def read(directory):
        with np.load(directory / "reference.npz") as arrays:
            return arrays["tokens"], arrays["logits"], arrays["greedy"]

    return read


@pytest.fixture
def change_config():
    """change_config(directory, **values) writes other values into config.json; None removes one."""

    def change(directory, **values):
        path = directory / "config.json"
        config = json.loads(path.read_text()) | values
        config = {name: x for name, x in config.items() if x != "removed"}
        path.write_text(json.dumps(config))

    return change
