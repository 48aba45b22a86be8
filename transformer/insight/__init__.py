"""How information moves between tokens: made visible, and changed."""

from transformer.insight.edits import add, cut, edit, patch, replace, scale
from transformer.insight.intervene import Intervened, intervene
from transformer.insight.trace import Reading, Trace, trace

__all__ = [
    "Intervened",
    "Reading",
    "Trace",
    "add",
    "cut",
    "edit",
    "intervene",
    "patch",
    "replace",
    "scale",
    "trace",
]
