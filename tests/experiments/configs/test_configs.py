"""The configs that come with the code."""

import importlib
import pkgutil

import pytest

from experiments import configs
from experiments.run.config import Experiment, read_config
from experiments.run.prepare import shorten_warmup
from experiments.run.rl_config import RlExperiment

NAMES = [module.name for module in pkgutil.iter_modules(configs.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole(name):
    made = importlib.import_module(f"experiments.configs.{name}").get_config()
    config = read_config(made, RlExperiment if "rl" in made else Experiment)
    assert config.data.length <= config.architecture(vocab_size=300).max_length
    assert shorten_warmup(config) == config


def test_the_names_are_those_of_the_readme():
    assert {"demo", "gpt2", "tiny"} <= set(NAMES)
