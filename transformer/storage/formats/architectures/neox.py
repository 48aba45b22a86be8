"""GPT-NeoX, of which Pythia is one."""

from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import QKV_BY_HEAD
from transformer.storage.formats.options import Always, Chosen, Only, Same
from transformer.storage.formats.rotary import Rotary
from transformer.storage.formats.tables import Named, biased

_LAYER, _OURS = "gpt_neox.layers.{n}.", "layers.{n}."
UNGATED = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def _table(config):
    del config
    qkv = lambda kind: tuple(f"{_OURS}mixer.{name}.{kind}" for name in ("query", "key", "value"))
    return {
        "embedding": "gpt_neox.embed_in.weight",
        "output.weight": "embed_out.weight",
        **biased(
            {
                "final_norm": "gpt_neox.final_layer_norm",
                _OURS + "mixer_norm": _LAYER + "input_layernorm",
                _OURS + "feed_forward_norm": _LAYER + "post_attention_layernorm",
                _OURS + "mixer.output": _LAYER + "attention.dense",
                _OURS + "feed_forward.up": _LAYER + "mlp.dense_h_to_4h",
                _OURS + "feed_forward.down": _LAYER + "mlp.dense_4h_to_h",
            }
        ),
        **{
            qkv(kind): Named(f"{_LAYER}attention.query_key_value.{kind}", QKV_BY_HEAD)
            for kind in ("weight", "bias")
        },
    }


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    (
        Same("vocab_size", "vocab_size"),
        Same("max_position_embeddings", "max_length"),
        Same("num_hidden_layers", "num_layers"),
        Same("hidden_size", "width"),
        Same("num_attention_heads", "num_heads"),
        Same("intermediate_size", "feed_forward_width"),
        Same("layer_norm_eps", "norm_epsilon", float, 1e-5),
        Chosen("hidden_act", "feed_forward", UNGATED, "gelu"),
        Same("use_parallel_residual", "parallel_residual", bool, True),
        Same("tie_word_embeddings", "tie_embeddings", bool, False),
        Rotary(partial=True, fraction=0.25, base_key="rotary_emb_base", fraction_key="rotary_pct"),
        Chosen("attention_bias", "biases", {True: "all", False: "feed_forward"}, True),
        Only("is_decoder", (False, True)),
        Always({"norm": "layer"}),
    ),
    _table,
    prefix="gpt_neox.",
    ignored=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
)
