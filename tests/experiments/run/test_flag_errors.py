"""What is said of flags that cannot be parsed."""

import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from experiments.run.flag_errors import describe

TINY = Path(__file__).parents[3] / "experiments" / "configs" / "tiny.py"


@pytest.fixture
def said(monkeypatch):
    """A function that returns what is said of some flags, which are wrong."""

    def said(*argv):
        monkeypatch.setattr(sys, "argv", ["train", *argv])  # where ml_collections looks for fields
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of the test before
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_file("config", str(TINY), flag_values=values)
            values(sys.argv)
            values.config.keys()  # as main does
        except Exception as error:
            return describe(error, sys.argv)
        raise AssertionError("nothing is wrong")

    return said


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.stepz=3", "unknown field config.train.stepz; did you mean config.train."),
        ("--config.trian.steps=3", "unknown field config.trian; did you mean config.train?"),
        ("--config.train.xyz=3", "unknown field config.train.xyz."),
        ("--config.train.steps.x=3", "config.train.steps has no fields, and so no x."),
        ("--config.train.steps=many", "flag --config.train.steps=many: invalid literal for int"),
        ("--config.model.qk_norm=perhaps", "flag --config.model.qk_norm=perhaps: "),
        ("--config.model.rotary_scaling.kind=ntk", "config.model.rotary_scaling is None, so that"),
        ("--confg.train.steps=3", "confg.train.steps"),
        ("--config=/nowhere.py", "the file of --config, /nowhere.py, does not exist."),
    ],
)  # fmt: skip
def test_fields_are_named_in_full(said, flag, message):
    text = said(flag)
    assert message in " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no python", "config.py, line 1, is not Python"),
        ("steps = 3", "no function get_config"),
        ("def get_config():\n    raise ValueError('too few')", "ValueError: too few"),
    ],
)
def test_a_config_file_that_is_none(said, tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    assert message in said(f"--config={path}", "--config.train.steps=3")
