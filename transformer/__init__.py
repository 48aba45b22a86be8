"""A transformer as one function of one token: the public surface."""

from transformer.config import Config
from transformer.inference.completion import Completion
from transformer.inference.generate import generate
from transformer.inference.score import score
from transformer.insight.intervene import intervene
from transformer.insight.trace import trace
from transformer.memory.cache import Cache
from transformer.memory.cells import Cells, Window
from transformer.memory.fold import Fold
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax
from transformer.modes.contract import check_contract
from transformer.modes.depth import depth
from transformer.modes.schedule import run
from transformer.presets import presets
from transformer.program.init import init_cache, init_params
from transformer.program.params import Params
from transformer.program.program import program
from transformer.storage.model import Model, load, save

__all__ = [
    "Cache",
    "Cells",
    "Completion",
    "Config",
    "Fold",
    "Memory",
    "Model",
    "Params",
    "Softmax",
    "Window",
    "check_contract",
    "depth",
    "generate",
    "init_cache",
    "init_params",
    "intervene",
    "load",
    "presets",
    "program",
    "run",
    "save",
    "score",
    "trace",
]
