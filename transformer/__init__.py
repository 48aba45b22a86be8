"""A transformer as one function of one token: the public surface."""

from transformer.cache import Block, Cache
from transformer.completion import Completion
from transformer.config import Config, presets
from transformer.generate import generate
from transformer.model import Model, load, save, score
from transformer.program import Params, init_cache, init_params, program
from transformer.schedule import run

__all__ = [
    "Block",
    "Cache",
    "Completion",
    "Config",
    "Model",
    "Params",
    "generate",
    "init_cache",
    "init_params",
    "load",
    "presets",
    "program",
    "run",
    "save",
    "score",
]
