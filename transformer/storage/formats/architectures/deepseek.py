"""DeepSeek-V2 and V3: latent attention, and experts beside one that all tokens run through."""

import math
from dataclasses import replace

from transformer.config import Latent
from transformer.storage.formats.architectures.llama import (
    ATTENTION_BIAS,
    DENSE,
    LAYER,
    OURS,
    activation,
    experts,
    norm_epsilon,
    tied,
)
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import (
    KEY_VALUE_BY_HEAD,
    LATENT_DOWN,
    LATENT_QUERY,
    TRANSPOSED,
)
from transformer.storage.formats.options import Always, Only, Same, Unused
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.tables import Named, biased


def _table(config, query_layout=LATENT_QUERY, down_layout=LATENT_DOWN):
    attention = LAYER + "self_attn."
    query = "q_b_proj" if config.latent.query_rank else "q_proj"
    down = {
        f"{OURS}latent.down.{kind}": Named(f"{attention}kv_a_proj_with_mqa.{kind}", down_layout)
        for kind in ("weight", "bias")
    }
    return {
        **experts(config),
        **down,
        **biased(
            {
                OURS + "latent.query_down": attention + "q_a_proj",
                OURS + "latent.output": attention + "o_proj",
            }
        ),
        OURS + "latent.query.weight": Named(f"{attention}{query}.weight", query_layout),
        OURS + "latent.query_norm.scale": attention + "q_a_layernorm.weight",
        OURS + "latent.down_norm.scale": attention + "kv_a_layernorm.weight",
        (OURS + "latent.key.weight", OURS + "latent.value.weight"): Named(
            attention + "kv_b_proj.weight", KEY_VALUE_BY_HEAD
        ),
        OURS + "experts.choice_bias": LAYER + "mlp.gate.e_score_correction_bias",
        **{
            f"{OURS}experts.shared.{ours}.weight": f"{LAYER}mlp.shared_experts.{theirs}.weight"
            for ours, theirs in DENSE.items()
        },
    }


class Sizes:
    """The ranks and sizes of latent attention."""

    def read(self, fields, found):
        """As in `Option`."""
        found["head_size"] = fields.take("qk_nope_head_dim", int)
        found["latent"] = Latent(
            rank=fields.take("kv_lora_rank", int),
            query_rank=fields.take("q_lora_rank", int | None, None),
            rotary_size=fields.take("qk_rope_head_dim", int),
            value_size=fields.take("v_head_dim", int),
            # It is that of the published layer's norms by default, whatever the config says.
            norm_epsilon=1e-6,
        )
        # Sizes that follow from others, and one that is not read.
        fields.drop("head_dim", "qk_head_dim", "num_key_value_heads")

    def write(self, config, values):
        """As in `Option`."""
        latent, H = config.latent or Latent(1), config.shape.H
        values |= {
            "qk_nope_head_dim": H,
            "qk_rope_head_dim": latent.rotary_size,
            "v_head_dim": latent.value_size or H,
            "kv_lora_rank": latent.rank,
            "q_lora_rank": latent.query_rank,
            "num_key_value_heads": config.num_heads,
        }


_SHARES = {True: "sigmoid", False: "sigmoid_all"}


class Mixture:
    """Routed experts, in groups, and shared ones.

    sigmoid: whether gates are sigmoids (V3) or a softmax over all experts (V2).
    """

    def __init__(self, sigmoid):
        self._sigmoid = sigmoid

    def read(self, fields, found):
        """As in `Option`."""
        found["num_experts"] = fields.take("n_routed_experts", int)
        fields.drop("num_local_experts")
        found["experts_per_token"] = fields.take("num_experts_per_tok", int)
        width = fields.take("moe_intermediate_size", int)
        found["expert_width"] = width
        found["shared_expert_width"] = width * (fields.take("n_shared_experts", int | None, 0) or 0)
        found["num_dense_layers"] = fields.take("first_k_dense_replace", int, 0)
        scale, groups, chosen = (2.5, 8, 4) if self._sigmoid else (1.0, 1, 1)
        found["expert_scale"] = fields.take("routed_scaling_factor", float, scale)
        fields.only("moe_layer_freq", 1)
        groups = fields.take("n_group", int | None, groups) or 1
        chosen = fields.take("topk_group", int | None, chosen) or 1
        if self._sigmoid:
            shares = fields.choose("norm_topk_prob", _SHARES, True)
            fields.only("scoring_func", "sigmoid")
            fields.only("topk_method", "noaux_tc")
            found["expert_gates"] = shares
        else:
            # Where it is true DeepSeek's own program makes shares of the gates, transformers not.
            fields.only("norm_topk_prob", False)
            fields.only("scoring_func", "softmax")
            method = fields.choose(
                "topk_method",
                {"greedy": False, "group_limited_greedy": True, None: False},
                "greedy",
            )
            groups = groups if method else 1
            found["expert_gates"] = "all"
        found["expert_groups"] = (groups, chosen) if groups > 1 else None

    def write(self, config, values):
        """As in `Option`."""
        width = config.expert_width or config.shape.F
        groups, chosen = config.expert_groups or (1, 1)
        values |= {
            "n_routed_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": width,
            "n_shared_experts": config.shared_expert_width // width,
            "first_k_dense_replace": config.num_dense_layers,
            "routed_scaling_factor": config.expert_scale,
            "n_group": groups,
            "topk_group": chosen,
            "norm_topk_prob": config.expert_gates == "sigmoid",
        }
        if not self._sigmoid:
            values["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"


class StretchedRotary(Rotary):
    """`Rotary`, and the scale of attention, which grows with the stretch of positions."""

    def read(self, fields, found):
        """As in `Option`."""
        given = fields.peek("rope_parameters") or fields.peek("rope_scaling") or {}
        super().read(fields, found)
        scale, scaling = _plain_scale(found["head_size"], found["latent"]), found["rotary_scaling"]
        of_all = given.get("mscale_all_dim")
        if scaling is not None and scaling.factor > 1 and of_all:
            scale *= (0.1 * of_all * math.log(scaling.factor) + 1) ** 2
        found["attention_scale"] = scale

    def write(self, config, values):
        """As in `Option`."""
        super().write(config, values)
        plain, scaling = _plain_scale(config.shape.H, config.latent), config.rotary_scaling
        growth = (config.attention_scale or plain) / plain
        if scaling is not None and scaling.factor > 1 and growth > 1:
            of_all = round((growth**0.5 - 1) / (0.1 * math.log(scaling.factor)), 9)
            for rope in values["rope_parameters"], values["rope_scaling"]:
                rope |= {"mscale": of_all, "mscale_all_dim": of_all}


def _plain_scale(head_size, latent):
    return (head_size + (latent or Latent(1)).rotary_size) ** -0.5


_SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("max_position_embeddings", "max_length"),
    Same("num_hidden_layers", "num_layers"),
    Same("hidden_size", "width"),
    Same("num_attention_heads", "num_heads"),
    Same("intermediate_size", "feed_forward_width"),
    activation(),
    tied(),
    Sizes(),
    ATTENTION_BIAS,
    Only("mlp_bias"),
    norm_epsilon(),
    Always({"layer_kinds": "latent"}),
)

DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    (*_SIZES, Mixture(sigmoid=False), StretchedRotary()),
    _table,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    (
        *_SIZES,
        Mixture(sigmoid=True),
        Only("rope_interleave", (True, False)),
        Unused(
            ("num_nextn_predict_layers", "num_mtp_layers"),
            "layers that predict tokens further ahead are not read",
        ),
        StretchedRotary(),
    ),
    _table,
    ignored=(r"model\.layers\.{L}\..*",),
    variant=lambda values: _IN_HALVES if values.get("rope_interleave") is False else None,
)
# What turns lies in two halves already, as it does here.
_IN_HALVES = replace(DEEPSEEK_V3, table=lambda config: _table(config, TRANSPOSED, TRANSPOSED))
