"""Phi-3 and Phi-4."""

from transformer.storage.formats.architectures.llama import (
    HEAD_SIZE,
    LAYER,
    OURS,
    SIZES,
    activation,
    norm_epsilon,
    table,
    tied,
)
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import GATE_UP_ROWS, QKV_ROWS
from transformer.storage.formats.options import Only
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.tables import Named
from transformer.storage.formats.windows import AllLayers


def _table(config):
    qkv = tuple(f"{OURS}mixer.{name}.weight" for name in ("query", "key", "value"))
    gate_up = tuple(f"{OURS}feed_forward.{name}.weight" for name in ("gate", "up"))
    return {
        **table(config),
        qkv: Named(LAYER + "self_attn.qkv_proj.weight", QKV_ROWS),
        gate_up: Named(LAYER + "mlp.gate_up_proj.weight", GATE_UP_ROWS),
    }


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    (
        *SIZES,
        HEAD_SIZE,
        norm_epsilon(1e-5),
        activation(),
        tied(),
        Rotary(partial=True),
        AllLayers(),
        Only("attention_bias", (False,)),
    ),
    _table,
)
