"""GPT-2."""

from transformer.storage.formats.architectures.neox import UNGATED
from transformer.storage.formats.family import Family
from transformer.storage.formats.layouts import QKV_COLUMNS, QKV_VECTOR, SAME
from transformer.storage.formats.options import Always, Chosen, Only, Same, Unused
from transformer.storage.formats.tables import Named, biased

_LAYER, _OURS = "transformer.h.{n}.", "layers.{n}."
_QKV = tuple(f"{_OURS}mixer.{name}." for name in ("query", "key", "value"))


def _table(config):
    plain = biased(
        {
            _OURS + "mixer_norm": _LAYER + "ln_1",
            _OURS + "feed_forward_norm": _LAYER + "ln_2",
            "final_norm": "transformer.ln_f",
        }
    )
    # Matrices are [in, out] in GPT-2 too.
    matrices = biased(
        {
            _OURS + "mixer.output": _LAYER + "attn.c_proj",
            _OURS + "feed_forward.up": _LAYER + "mlp.c_fc",
            _OURS + "feed_forward.down": _LAYER + "mlp.c_proj",
        }
    )
    return {
        "embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        **plain,
        **{ours: Named(theirs, SAME) for ours, theirs in matrices.items()},
        tuple(x + "weight" for x in _QKV): Named(_LAYER + "attn.c_attn.weight", QKV_COLUMNS),
        tuple(x + "bias" for x in _QKV): Named(_LAYER + "attn.c_attn.bias", QKV_VECTOR),
        "output.weight": "lm_head.weight",
    }


class Scale:
    """`scale_attn_weights`: whether scores are divided by the root of the head size."""

    def read(self, fields, found):
        """As in `Option`."""
        scaled = fields.take("scale_attn_weights", bool, True)
        found["attention_scale"] = None if scaled else 1.0

    def write(self, config, values):
        """As in `Option`."""
        values["scale_attn_weights"] = config.attention_scale != 1


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    (
        Same("vocab_size", "vocab_size"),
        Same("n_positions", "max_length"),
        Same("n_layer", "num_layers"),
        Same("n_embd", "width"),
        Same("n_head", "num_heads"),
        Same("n_inner", "feed_forward_width", int | None, None),
        Same("layer_norm_epsilon", "norm_epsilon", float, 1e-5),
        Chosen("activation_function", "feed_forward", UNGATED, "gelu_new"),
        Same("tie_word_embeddings", "tie_embeddings", bool, True),
        Scale(),
        Only("scale_attn_by_inverse_layer_idx"),  # layers here have one scale
        # It scales in another order, which gives the same numbers but for rounding.
        Only("reorder_and_upcast_attn", (False, True)),
        Unused(("n_ctx",), "it is n_positions under an old name"),
        Always({"positions": "learned", "norm": "layer", "biases": "all"}),
    ),
    _table,
    prefix="transformer.",
    ignored=(r".*\.attn\.(masked_)?bias",),
)
