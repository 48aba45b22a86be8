"""Qwen 2 and 3, Qwen2-MoE and Qwen3-Next."""

from dataclasses import replace

from transformer.config import Delta
from transformer.storage.formats.architectures.llama import (
    ATTENTION_BIAS,
    DENSE,
    LAYER,
    OURS,
    SIZES,
    activation,
    experts,
    norm_epsilon,
    table,
    tied,
)
from transformer.storage.formats.architectures.mixtures import (
    CHOSEN,
    GATES,
    DenseLayers,
    NumExperts,
)
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import (
    CONVOLUTION,
    DELTA_CHANNELS,
    DELTA_STEPS,
    PLUS_ONE,
    QUERY_AND_GATE,
    SAME,
)
from transformer.storage.formats.options import Always, Chosen, Same
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.tables import Named
from transformer.storage.formats.windows import SomeLayers, shortest

_SHARED = (*SIZES, norm_epsilon(), activation(), tied(), Rotary())

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (*_SHARED, SomeLayers(), Always({"biases": "qkv"})),
    table,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (
        *_SHARED,
        Same("head_dim", "head_size", int, 128),
        SomeLayers(),
        ATTENTION_BIAS,
        Always({"qk_norm": True}),
    ),
    table,
)


_KINDS = {"linear_attention": "delta", "full_attention": "attention"}
_SIZES = {
    "linear_num_key_heads": ("num_key_heads", 16),
    "linear_num_value_heads": ("num_value_heads", 32),
    "linear_key_head_dim": ("key_size", 128),
    "linear_value_head_dim": ("value_size", 128),
    "linear_conv_kernel_dim": ("convolution", 4),
}


class Kinds:
    """`layer_types`: the gated delta rule, or attention, which comes every fourth layer."""

    def read(self, fields, found):
        """As in `Option`."""
        layers = range(found["num_layers"])
        period = fields.take("full_attention_interval", int, 4)
        default = [list(_KINDS)[(n + 1) % period == 0] for n in layers]
        kinds = fields.take("layer_types", tuple[str, ...] | None, None) or default
        if len(kinds) != len(layers) or set(kinds) - set(_KINDS):
            raise fields.refused(
                f"layer_types={list(kinds)}", f"it must name one of {list(_KINDS)} for each layer"
            )
        found["layer_kinds"] = shortest([_KINDS[kind] for kind in kinds])

    def write(self, config, values):
        """As in `Option`."""
        names = {ours: theirs for theirs, ours in _KINDS.items()}
        values["layer_types"] = [names.get(kind) for kind, _ in config.layers]


class Sizes:
    """The sizes of the gated delta rule, as fields of `Delta`."""

    def read(self, fields, found):
        """As in `Option`."""
        sizes = {ours: fields.take(key, int, size) for key, (ours, size) in _SIZES.items()}
        found["delta"] = Delta(**sizes)

    def write(self, config, values):
        """As in `Option`."""
        sizes = config.delta_sizes
        values |= {key: getattr(sizes, ours) for key, (ours, _) in _SIZES.items()}


class SharedExpert:
    """The width of the expert that all tokens run through, which has a gate."""

    def __init__(self, default):
        """default: the width where none is given."""
        self._default = default

    def read(self, fields, found):
        """As in `Option`."""
        width = fields.take("shared_expert_intermediate_size", int, self._default)
        found |= {"shared_expert_width": width, "shared_expert_gate": True}

    def write(self, config, values):
        """As in `Option`."""
        values["shared_expert_intermediate_size"] = config.shared_expert_width


def _shared_experts(config, norm_layout=SAME):
    mixture = OURS + "experts."
    return {
        **experts(config, norm_layout=norm_layout),
        **{
            f"{mixture}shared.{ours}.weight": f"{LAYER}mlp.shared_expert.{theirs}.weight"
            for ours, theirs in DENSE.items()
        },
        mixture + "shared_gate.weight": LAYER + "mlp.shared_expert_gate.weight",
    }


def _next_table(config):
    theirs, ours, mixer = LAYER + "linear_attn.", OURS + "delta.", OURS + "mixer."
    return {
        **_shared_experts(config, PLUS_ONE),
        **{
            (f"{mixer}query.{kind}", f"{mixer}gate.{kind}"): Named(
                f"{LAYER}self_attn.q_proj.{kind}", QUERY_AND_GATE
            )
            for kind in ("weight", "bias")
        },
        (ours + "channels.weight", ours + "gate.weight"): Named(
            theirs + "in_proj_qkvz.weight", DELTA_CHANNELS
        ),
        (ours + "strength.weight", ours + "decay.weight"): Named(
            theirs + "in_proj_ba.weight", DELTA_STEPS
        ),
        ours + "convolution": Named(theirs + "conv1d.weight", CONVOLUTION),
        ours + "log_rate": theirs + "A_log",
        ours + "decay_bias": theirs + "dt_bias",
        ours + "norm.scale": theirs + "norm.weight",
        ours + "output.weight": theirs + "out_proj.weight",
    }


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        *_SHARED,
        NumExperts(),
        CHOSEN,
        GATES,
        Same("moe_intermediate_size", "expert_width", int, 1408),
        SharedExpert(5632),
        DenseLayers(),
        SomeLayers(every_other=True),
        Chosen("qkv_bias", "biases", {True: "qkv", False: "none"}, True),
    ),
    _shared_experts,
)
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    (
        *_SHARED[:-1],
        Rotary(partial=True, fraction=0.25),
        Same("head_dim", "head_size", int, 256),
        NumExperts(),
        CHOSEN,
        replace(GATES, default=True),
        Same("moe_intermediate_size", "expert_width", int, 512),
        SharedExpert(512),
        DenseLayers(),
        Kinds(),
        Sizes(),
        ATTENTION_BIAS,
        Always({"qk_norm": True, "attention_gate": True}),
    ),
    _next_table,
    ignored=(r"mtp\..*",),
)
