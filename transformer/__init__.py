"""A transformer as one function of one token: the public surface."""

from transformer.config import Config
from transformer.inference.completion import Completion
from transformer.inference.generate import generate
from transformer.inference.score import score
from transformer.memory.cache import Block, Cache
from transformer.modes.schedule import run
from transformer.presets import presets
from transformer.program.program import Params, init_cache, init_params, program
from transformer.storage.model import Model, load, save

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
