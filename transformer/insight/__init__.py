"""How information moves between tokens: made visible, and changed."""

from transformer.insight.attribution import attribution, contributions, gradients
from transformer.insight.direct import Direct, direct
from transformer.insight.edits import add, cut, edit, patch, replace, scale
from transformer.insight.flow import Flow, edges, flow, without_reads
from transformer.insight.intervene import Intervened, intervene
from transformer.insight.jacobian import jacobian
from transformer.insight.lens import TunedLens, lens, tune
from transformer.insight.names import hooks
from transformer.insight.patching import activation_patching, path_patching
from transformer.insight.plot import plot_flow, token_texts
from transformer.insight.residual import Stream, stream
from transformer.insight.trace import Reading, Trace, trace

__all__ = [
    "Direct",
    "Flow",
    "Intervened",
    "Reading",
    "Stream",
    "Trace",
    "TunedLens",
    "activation_patching",
    "add",
    "attribution",
    "contributions",
    "cut",
    "direct",
    "edges",
    "edit",
    "flow",
    "gradients",
    "hooks",
    "intervene",
    "jacobian",
    "lens",
    "patch",
    "path_patching",
    "plot_flow",
    "replace",
    "scale",
    "stream",
    "token_texts",
    "trace",
    "tune",
    "without_reads",
]
