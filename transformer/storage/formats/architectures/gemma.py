"""Gemma 1, 2 and 3."""

from transformer.storage.formats.architectures.llama import (
    ATTENTION_BIAS,
    BOTH,
    SIZES,
    activation,
    norm_epsilon,
    table,
    tied,
)
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import PLUS_ONE
from transformer.storage.formats.options import (
    Always,
    Chosen,
    Only,
    RootOfWidth,
    Same,
    Scale,
    Unused,
)
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.windows import SomeLayers

_SHARED = (
    *SIZES,
    Same("head_dim", "head_size", int, 256),
    norm_epsilon(),
    tied(True),
    ATTENTION_BIAS,
    RootOfWidth(),
)
_SECOND = (
    *_SHARED,
    activation("hidden_activation", "gelu_pytorch_tanh"),
    Scale(),
)


def _table(config):
    return table(config, BOTH, PLUS_ONE)


# Gemma 1 computes its GELU in the tanh form, also where its file says "gelu".
_GELU = {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}

GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    (
        *_SHARED,
        Chosen("hidden_act", "feed_forward", _GELU, "gelu_pytorch_tanh"),
        Only("hidden_activation", (None, "gelu_pytorch_tanh")),
        Rotary(),
    ),
    lambda config: table(config, norm_layout=PLUS_ONE),
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    (
        *_SECOND,
        Same("final_logit_softcapping", "logit_soft_cap", float | None, 30.0),
        Same("attn_logit_softcapping", "attention_soft_cap", float | None, 50.0),
        Rotary(),
        SomeLayers(period=2),
        Always({"norm_placement": "both"}),
    ),
    _table,
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    (
        *_SECOND,
        Same("final_logit_softcapping", "logit_soft_cap", float | None, None),
        Rotary(1_000_000.0, local_base=10_000.0),
        SomeLayers(period=6),
        Unused(("attn_logit_softcapping",), "Gemma 3 has the key, but its scores have no cap"),
        Always({"norm_placement": "both", "qk_norm": True}),
    ),
    _table,
)
