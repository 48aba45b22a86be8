"""A published config, read strictly: a key is used, ignored for a reason, or refused by name."""

from collections.abc import Mapping
from typing import Any

from transformer.config import fits, wrong_type

_REQUIRED = object()

# Keys that change nothing about what a model computes for tokens, and why.
_NAMES = "it names something, and computes nothing"
_GENERATION = "it is a default of generation, which is read from generation_config.json"
_TRAINING = "it acts in training only"
_FRESH = "it is about fresh parameters"
_SOFTWARE = "it is about the software that wrote the file"
_HEADS = "it is about heads that are not there"
_RESULTS = "it chooses what another program returns, not what is computed"
IGNORED: dict[str, str] = {
    **dict.fromkeys(("_name_or_path", "architectures", "finetuning_task", "name_or_path"), _NAMES),
    **dict.fromkeys(("torch_dtype", "dtype"), "the tensors say of which type they are"),
    **dict.fromkeys(("transformers_version", "auto_map", "quantization_config_comment"), _SOFTWARE),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _SOFTWARE),
    **dict.fromkeys(("_attn_implementation_autoset", "torchscript", "use_bfloat16"), _SOFTWARE),
    **dict.fromkeys(
        ("tf_legacy_loss", "unsloth_fixed", "unsloth_version", "gradient_checkpointing"), _SOFTWARE
    ),
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), _FRESH),
    "initializer_cutoff_factor": _FRESH,
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), _TRAINING),
    **dict.fromkeys(("dropout", "activation_dropout", "hidden_dropout", "layerdrop"), _TRAINING),
    **dict.fromkeys(
        ("embedding_dropout", "classifier_dropout", "summary_first_dropout"), _TRAINING
    ),
    **dict.fromkeys(
        ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"), _TRAINING
    ),
    **dict.fromkeys(("aux_loss_alpha", "seq_aux", "router_z_loss_coef", "ep_size"), _TRAINING),
    "initial_context_length": "it is the length that rope scaling names too",
    "use_cache": "there is always a cache",
    "pretraining_tp": "it splits products over devices",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _GENERATION),
    **dict.fromkeys(
        ("decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens"), _GENERATION
    ),
    **dict.fromkeys(("max_length", "min_length", "do_sample", "early_stopping"), _GENERATION),
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty"), _GENERATION),
    **dict.fromkeys(("temperature", "top_k", "top_p", "typical_p"), _GENERATION),
    **dict.fromkeys(
        ("repetition_penalty", "length_penalty", "prefix", "bad_words_ids"), _GENERATION
    ),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _GENERATION),
    **dict.fromkeys(("num_return_sequences", "output_scores", "forced_bos_token_id"), _GENERATION),
    **dict.fromkeys(("forced_eos_token_id", "remove_invalid_values"), _GENERATION),
    **dict.fromkeys(("exponential_decay_length_penalty", "task_specific_params"), _GENERATION),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type"), _HEADS),
    **dict.fromkeys(("summary_activation", "summary_proj_to_labels", "summary_type"), _HEADS),
    **dict.fromkeys(("summary_use_proj", "pruned_heads", "tie_encoder_decoder"), _HEADS),
    "cross_attention_hidden_size": _HEADS,
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), _RESULTS),
    **dict.fromkeys(("return_dict_in_generate", "chunk_size_feed_forward"), _RESULTS),
}
# What would make another kind of model, by the only value that is allowed.
_ONLY = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
    "use_bidirectional_attention": (None, False),
}


class Fields:
    """The keys of a published config that have not been read yet."""

    def __init__(self, values: Mapping[str, Any], where: str):
        """Takes the values and how messages call the file they are from."""
        self._left, self._where = dict(values), where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def peek(self, name: str):
        """Returns the value of a key that is not marked as read; None where it is missing."""
        return self._left.get(name)

    def take(self, name: str, kind, default=_REQUIRED):
        """Returns the value of a key, and marks it as read.

        Args:
          name: the key.
          kind: its type, as `config.fits` takes it; None: any.
          default: where the key is missing; without one, that is an error.

        Raises:
          ValueError: the key is missing, or its value is of another type.
        """
        if name not in self._left:
            if default is _REQUIRED:
                raise ValueError(f"{self._where} lacks {name}.")
            return default
        value = self._left.pop(name)
        if isinstance(value, int) and kind is float and not isinstance(value, bool):
            value = float(value)
        if kind is not None and not fits(value, kind):
            raise ValueError(f"{name}={value!r} of {self._where} {wrong_type(value, kind)}")
        return value

    def choose(self, name: str, choices: Mapping, default=_REQUIRED):
        """Returns what a key's value stands for.

        Args:
          name: the key.
          choices: from the values that are supported to what they stand for.
          default: the value where the key is missing.

        Raises:
          ValueError: the value is not among them.
        """
        value = self.take(name, None, default)
        if not isinstance(value, str | int | float | None) or value not in choices:
            raise self.refused(f"{name}={value!r}", f"it must be {_listed(choices)}")
        return choices[value]

    def only(self, name: str, *allowed) -> None:
        """Reads a key that has no counterpart here, and whose value must be one of those allowed.

        Raises:
          ValueError: it is another.
        """
        if name in self._left:
            self.choose(name, dict.fromkeys(allowed))

    def drop(self, *names: str) -> None:
        """Reads keys that mean nothing in this place."""
        for name in names:
            self._left.pop(name, None)

    def refused(self, what: str, why: str) -> ValueError:
        """The error that something in the file is not supported."""
        return ValueError(f"{what} of {self._where} is not supported; {why}.")

    def finish(self) -> None:
        """Refuses what has not been read, unless there is a reason to ignore it.

        Raises:
          ValueError: names the keys that are left.
        """
        for name, allowed in _ONLY.items():
            self.only(name, *(allowed if isinstance(allowed, tuple) else (allowed,)))
        left = [name for name in self._left if name not in IGNORED]
        if left:
            raise ValueError(
                f"{self._where} has keys that are not known for this architecture: "
                f"{', '.join(f'{name}={self._left[name]!r}'[:80] for name in left)}. They may "
                "change what the model computes, so it is not loaded."
            )


def _listed(values):
    return " or ".join(map(repr, values))
