"""Llama, and what the families after it share with it: names of tensors and of sizes."""

from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import SAME, STACKED
from transformer.storage.formats.options import Always, Chosen, Same
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.tables import Named, biased
from transformer.storage.formats.windows import AllLayers

LAYER, OURS = "model.layers.{n}.", "layers.{n}."
# Norms before a sublayer; norms before it and on its output; norms on its output alone.
PRE = {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
OUTPUT = {
    "mixer_post_norm": "post_attention_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
BOTH = OUTPUT | {"mixer_norm": "input_layernorm", "feed_forward_norm": "pre_feedforward_layernorm"}
DENSE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu_exact",
    "gelu_pytorch_tanh": "geglu",
    "gelu_new": "geglu",
    "relu": "reglu",
}
SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("max_position_embeddings", "max_length"),
    Same("num_hidden_layers", "num_layers"),
    Same("hidden_size", "width"),
    Same("num_attention_heads", "num_heads"),
    Same("intermediate_size", "feed_forward_width"),
    Same("num_key_value_heads", "num_kv_heads", int | None, None),
)


def table(config, norms=PRE, norm_layout=SAME):
    """The names of Llama's tensors.

    Args:
      config: not looked at: which tensors there are follows from its parameters.
      norms: what the norms of a layer are called.
      norm_layout: how the numbers of norms are stored.
    """
    del config
    scales = biased(
        {
            "final_norm": "model.norm",
            **{OURS + ours: LAYER + theirs for ours, theirs in norms.items()},
            OURS + "mixer.q_norm": LAYER + "self_attn.q_norm",
            OURS + "mixer.k_norm": LAYER + "self_attn.k_norm",
        }
    )
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    return {
        "embedding": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        **{ours: Named(theirs, norm_layout) for ours, theirs in scales.items()},
        **biased({f"{OURS}mixer.{x}": f"{LAYER}self_attn.{y}" for x, y in attention.items()}),
        **biased({f"{OURS}feed_forward.{x}": f"{LAYER}mlp.{y}" for x, y in DENSE.items()}),
    }


def activation(key="hidden_act", default="silu"):
    """The nonlinearity of the gate."""
    return Chosen(key, "feed_forward", GATED, default)


def norm_epsilon(default=1e-6):
    """The number under the root of the norms."""
    return Same("rms_norm_eps", "norm_epsilon", float, default)


def tied(default=False):
    """Whether the output is the embedding."""
    return Same("tie_word_embeddings", "tie_embeddings", bool, default)


def experts(config, names=DENSE, network="mlp", norm_layout=SAME):
    """The names of Llama's tensors where layers have experts, a tensor for each.

    Args:
      config: not looked at.
      names: of an expert's matrices, by ours.
      network: what the mixture is called.
      norm_layout: as in `table`.
    """
    expert = f"{LAYER}{network}.experts.{{x}}."
    return {
        **table(config, norm_layout=norm_layout),
        OURS + "experts.router.weight": f"{LAYER}{network}.gate.weight",
        **{
            f"{OURS}experts.{ours}.weight": Named(f"{expert}{theirs}.weight", STACKED)
            for ours, theirs in names.items()
        },
    }


HEAD_SIZE = Same("head_dim", "head_size", int | None, None)
ATTENTION_BIAS = Chosen(
    "attention_bias", "biases", {False: "none", True: "attention", None: "none"}, False
)


_BIASES = {
    (False, False): "none",
    (True, False): "attention",
    (False, True): "feed_forward",
    (True, True): "all",
}


class Biases:
    """`attention_bias` and `mlp_bias`."""

    def read(self, fields, found):
        """As in `Option`."""
        given = (fields.take(name, bool, False) for name in ("attention_bias", "mlp_bias"))
        found["biases"] = _BIASES[tuple(given)]

    def write(self, config, values):
        """As in `Option`."""
        values["attention_bias"] = config.biased("output")
        values["mlp_bias"] = config.biased("feed_forward")


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (
        *SIZES,
        HEAD_SIZE,
        norm_epsilon(),
        activation(),
        tied(),
        Biases(),
        Rotary(),
    ),
    table,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    (
        *SIZES,
        HEAD_SIZE,
        norm_epsilon(),
        activation(),
        tied(),
        Rotary(),
        AllLayers(default=4096),
    ),
    table,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        *SIZES,
        norm_epsilon(1e-5),
        activation(),
        tied(),
        ATTENTION_BIAS,
        Rotary(),
        Always({"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all"}),
    ),
    lambda config: table(config, OUTPUT),
)
