"""OPT."""

from transformer.storage.formats.architectures.neox import UNGATED
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import BEHIND_TWO
from transformer.storage.formats.options import Always, Chosen, Only, Same
from transformer.storage.formats.tables import Named, biased

_LAYER, _OURS = "model.decoder.layers.{n}.", "layers.{n}."


def _table(config):
    post = "_post" if config.norm_placement == "post" else ""
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    return {
        "embedding": "model.decoder.embed_tokens.weight",
        "positions": Named("model.decoder.embed_positions.weight", BEHIND_TWO),
        "output.weight": "lm_head.weight",
        "embedding_in.weight": "model.decoder.project_in.weight",
        "embedding_out.weight": "model.decoder.project_out.weight",
        **biased(
            {
                "final_norm": "model.decoder.final_layer_norm",
                f"{_OURS}mixer{post}_norm": _LAYER + "self_attn_layer_norm",
                f"{_OURS}feed_forward{post}_norm": _LAYER + "final_layer_norm",
                _OURS + "feed_forward.up": _LAYER + "fc1",
                _OURS + "feed_forward.down": _LAYER + "fc2",
                **{f"{_OURS}mixer.{x}": f"{_LAYER}self_attn.{y}" for x, y in attention.items()},
            }
        ),
    }


class EmbeddingWidth:
    """`word_embed_proj_dim`, the width of the model or another one."""

    def read(self, fields, found):
        """As in `Option`."""
        width = fields.take("word_embed_proj_dim", int | None, None)
        found["embedding_width"] = None if width == found["width"] else width

    def write(self, config, values):
        """As in `Option`."""
        values["word_embed_proj_dim"] = config.embedding_width or config.width


OPT = Family(
    "opt",
    "OPTForCausalLM",
    (
        Same("vocab_size", "vocab_size"),
        Same("max_position_embeddings", "max_length"),
        Same("num_hidden_layers", "num_layers"),
        Same("hidden_size", "width"),
        Same("num_attention_heads", "num_heads"),
        Same("ffn_dim", "feed_forward_width"),
        Chosen("activation_function", "feed_forward", UNGATED, "relu"),
        Chosen("do_layer_norm_before", "norm_placement", {True: "pre", False: "post"}, True),
        Same("tie_word_embeddings", "tie_embeddings", bool, True),
        EmbeddingWidth(),
        Chosen("enable_bias", "biases", {True: "all", False: "norms"}, True),
        Only("layer_norm_elementwise_affine", (True,)),
        Only("_remove_final_layer_norm"),
        Always({"positions": "learned", "norm": "layer", "norm_epsilon": 1e-5}),
    ),
    _table,
)
