"""Mixtures of experts: Mixtral, OLMoE, Qwen 3 and gpt-oss."""

from transformer.storage.formats.architectures.llama import (
    ATTENTION_BIAS,
    HEAD_SIZE,
    LAYER,
    OURS,
    SIZES,
    activation,
    experts,
    norm_epsilon,
    table,
    tied,
)
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import IN_TURNS, SAME
from transformer.storage.formats.options import Always, Chosen, Only, Same, Unused
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.tables import Named
from transformer.storage.formats.windows import AllLayers, SomeLayers

CHOSEN = Same("num_experts_per_tok", "experts_per_token")
GATES = Chosen("norm_topk_prob", "expert_gates", {False: "all", True: "chosen"}, False)


class NumExperts:
    """How many experts there are, which transformers 5 calls otherwise than 4."""

    def read(self, fields, found):
        """As in `Option`."""
        names = ("num_local_experts", "num_experts")
        found["num_experts"] = fields.take(next((x for x in names if x in fields), names[0]), int)
        fields.drop(*names)

    def write(self, config, values):
        """As in `Option`."""
        values["num_experts"] = values["num_local_experts"] = config.num_experts


class DenseLayers:
    """Layers of Qwen without experts: those named, and all but every `decoder_sparse_step`-th."""

    def read(self, fields, found):
        """As in `Option`."""
        step = fields.take("decoder_sparse_step", int, 1)
        if step < 1:
            raise fields.refused(f"decoder_sparse_step={step}", "it must be at least 1")
        named = fields.take("mlp_only_layers", tuple[int, ...] | None, None) or ()
        layers = range(found["num_layers"])
        dense = tuple(n for n in layers if n in named or (n + 1) % step)
        found["num_dense_layers"] = len(dense) if dense == tuple(range(len(dense))) else dense

    def write(self, config, values):
        """As in `Option`."""
        values["decoder_sparse_step"] = 1
        values["mlp_only_layers"] = sorted(config.dense_layers)


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *SIZES,
        HEAD_SIZE,
        NumExperts(),
        CHOSEN,
        norm_epsilon(1e-5),
        activation(),
        tied(),
        Rotary(1_000_000.0),
        AllLayers(),
    ),
    lambda config: experts(
        config, {"gate": "w1", "down": "w2", "up": "w3"}, network="block_sparse_moe"
    ),
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    (
        *SIZES,
        NumExperts(),
        CHOSEN,
        GATES,
        norm_epsilon(1e-5),
        activation(),
        tied(),
        ATTENTION_BIAS,
        Rotary(),
        Same("clip_qkv", "qkv_clip", float | None, None),
        Always({"qk_norm": True, "qk_norm_over": "all"}),
    ),
    experts,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *SIZES,
        Same("head_dim", "head_size", int | None, None),
        NumExperts(),
        CHOSEN,
        GATES,
        Same("moe_intermediate_size", "expert_width", int, 768),
        DenseLayers(),
        norm_epsilon(),
        activation(),
        tied(),
        ATTENTION_BIAS,
        Rotary(),
        AllLayers(flagged=True, default=4096),
        Unused(("max_window_layers",), "all layers have the window, or none"),
        Always({"qk_norm": True}),
    ),
    experts,
)


class Quantised:
    """`quantization_config`, which may say that experts are stored as MXFP4."""

    def read(self, fields, found):
        """As in `Option`."""
        quantised = fields.take("quantization_config", dict | None, None)
        if quantised is not None and quantised.get("quant_method") != "mxfp4":
            raise fields.refused(
                f"quant_method={quantised.get('quant_method')!r}", "it must be 'mxfp4'"
            )

    def write(self, config, values):
        """As in `Option`."""


def _gpt_oss(config):
    def both(name, layout):
        theirs = f"{LAYER}mlp.experts.{name}"
        return {"weight": Named(theirs, layout), "bias": Named(f"{theirs}_bias", layout)}

    gate_up, down = both("gate_up_proj", IN_TURNS), both("down_proj", SAME)
    pair = lambda kind: tuple(f"{OURS}experts.{x}.{kind}" for x in ("gate", "up"))
    return {
        **table(config),
        OURS + "mixer.sinks": LAYER + "self_attn.sinks",
        **{
            f"{OURS}experts.router.{kind}": f"{LAYER}mlp.router.{kind}"
            for kind in ("weight", "bias")
        },
        **{pair(kind): named for kind, named in gate_up.items()},
        **{f"{OURS}experts.down.{kind}": named for kind, named in down.items()},
    }


_SCALING = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}

GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    (
        *SIZES,
        Same("head_dim", "head_size", int, 64),
        NumExperts(),
        CHOSEN,
        norm_epsilon(1e-5),
        tied(),
        Rotary(150_000.0, scaling=_SCALING),
        SomeLayers(period=2, default=128),
        Quantised(),
        Chosen("attention_bias", "biases", {True: "all", False: "feed_forward"}, True),
        Only("hidden_act", ("silu",)),
        Only("swiglu_limit", (7.0,)),
        Only("swiglu_alpha", (1.702,)),
        Only("experts_per_token", (None, 4)),  # what the first files called num_experts_per_tok
        Always({"attention_sinks": True, "feed_forward": "swiglu_clipped"}),
    ),
    _gpt_oss,
)
