"""Qwen 2 and 3."""

from transformer.storage.formats.architectures.llama import (
    ATTENTION_BIAS,
    SIZES,
    activation,
    norm_epsilon,
    table,
    tied,
)
from transformer.storage.formats.family import Family
from transformer.storage.formats.options import Always, Same
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.windows import Windows

_SHARED = (*SIZES, norm_epsilon(), activation(), tied(), Rotary())

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (*_SHARED, Windows(default=4096), Always({"biases": "qkv"})),
    table,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (
        *_SHARED,
        Same("head_dim", "head_size", int, 128),
        Windows(default=4096),
        ATTENTION_BIAS,
        Always({"qk_norm": True}),
    ),
    table,
)
