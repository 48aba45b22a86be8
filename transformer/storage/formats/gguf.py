"""Models in files of GGUF, as llama.cpp reads them: Llama, Qwen 2 and 3, Gemma, and GPT-2.

The metadata become the config that transformers has for the same model, and the tensors get the
names that they have there; what follows is the same for both.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from transformer.config import Config, RotaryScaling
from transformer.data.tokenizer import Tokenizer
from transformer.program.params import Params
from transformer.storage.formats.architectures import FAMILIES
from transformer.storage.formats.gguf_file import Quantised, read_file
from transformer.storage.formats.gguf_tokenizer import read_tokenizer
from transformer.storage.formats.parameters import read_params, require_sizes
from transformer.storage.formats.tables import entries
from transformer.storage.keeping import Keeping

SUFFIX = ".gguf"

# From a key of an architecture to that of transformers.
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2_KEYS = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
}
_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}
# Keys that change nothing, or that other keys say as well.
_IGNORED = {
    "rope.dimension_count": "it is the head size, which is checked",
    "attention.value_length": "it is the head size, which is checked",
    "vocab_size": "the embedding says it",
    "rope.scaling.attn_factor": "it is read with the scaling",
    "rope.scaling.type": "it is read with the scaling",
    "rope.scaling.factor": "it is read with the scaling",
    "rope.scaling.original_context_length": "it is read with the scaling",
    "rope.scaling.finetuned": "it is about how the model was trained",
    "rope.scale_linear": "it is an older name of rope.scaling.factor",
    "attention.causal": "programs are causal",
}


def read(
    path: Path,
    dtype: str | None,
    keeping: Keeping = Keeping(),  # noqa: B008, it is immutable
) -> tuple[Config, Params, Tokenizer | None]:
    """Reads a model from a file of GGUF.

    Args:
      path: the file.
      dtype: "float32" or "bfloat16"; None: float32.
      keeping: how the parameters are kept.

    Raises:
      ValueError: the file is damaged, or its architecture or one of its types is not supported.
    """
    metadata, tensors = read_file(path)
    try:
        family, config = _config(metadata, tensors)
        config = config.replace(dtype=dtype or "float32", cache_dtype=keeping.cache)
        named = _named(family, config, tensors, metadata["general.architecture"])
        with ThreadPoolExecutor(1) as pool:
            tokenizer = pool.submit(read_tokenizer, metadata)
            params = read_params(family, config, named, np.dtype(config.dtype), keeping)
            return config, params, tokenizer.result()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def _config(metadata, tensors):
    """The architecture, by way of what transformers would have in config.json."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _TYPES:
        raise ValueError(
            f"general.architecture={name!r} is not one that can be loaded from GGUF; "
            f"those that can are {', '.join(_TYPES)}."
        )
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in metadata.items()
        if key.startswith(f"{name}.")
    }
    unknown = [key for key in own if key not in _KEYS and key not in _IGNORED]
    if unknown or "token_embd.weight" not in tensors:
        raise ValueError(
            f"keys that are not known for {name}: {', '.join(unknown)}."
            if unknown
            else "there is no tensor token_embd.weight."
        )
    values = {_KEYS[key]: value for key, value in own.items() if key in _KEYS}
    values["vocab_size"] = tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    _read_flavour(name, own, values)
    if name in ("llama", "qwen3"):
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if name == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if name == "qwen2":  # which transformers has with no other size
        size = values["hidden_size"] // values["num_attention_heads"]
        if values.pop("head_dim", size) != size:
            raise ValueError(f"{name}.attention.key_length must be {size}.")
    if name == "gpt2":
        values.pop("num_key_value_heads", None)
        values = {_GPT2_KEYS.get(key, key): value for key, value in values.items()}
    values = {key: x.item() if isinstance(x, np.generic) else x for key, x in values.items()}
    family = FAMILIES[_TYPES[name]]
    config = family.read(values, "its metadata")
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, config.shape.H) != config.shape.H:
            raise ValueError(f"{name}.{key}={own[key]}; the head size is {config.shape.H}.")
    if "rope_freqs.weight" in tensors:  # Llama 3's scaling, written out
        divisors = tuple(map(float, tensors["rope_freqs.weight"].read()))
        scaling = RotaryScaling("longrope", 1.0, attention_factor=1.0, divisors=divisors)
        config = config.replace(rotary_scaling=scaling)
    return family, config


def _read_flavour(name, own, values):
    """What the files leave to the architecture, or say otherwise than transformers does."""
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    magnitude = own.get("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and magnitude != 1.0:
        raise ValueError(f"rope.scaling.attn_factor={magnitude} is not supported without yarn.")
    if kind == "linear" or (kind == "none" and factor != 1.0):
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        before = own["rope.scaling.original_context_length"]
        values["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": before,
            "attention_factor": magnitude * (1 + 0.1 * math.log(factor)) if factor > 1 else None,
        }
    elif kind != "none":
        raise ValueError(f"rope.scaling.type={kind!r} is not supported.")
    if name in ("gemma2", "gemma3"):
        values["query_pre_attn_scalar"] = _query_scalar(name, values)


def _query_scalar(name, values):
    """Gemma's, which the files do not hold: the head size, but in the largest model of each."""
    largest = {"gemma2": 46, "gemma3": 62}[name]
    if values["num_hidden_layers"] == largest:
        return values["hidden_size"] // values["num_attention_heads"]
    return values["head_dim"]


@dataclass(frozen=True)
class _Changed:
    """A tensor that is stored otherwise than transformers stores it."""

    tensor: Quantised
    shape: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray]
    dtype = np.dtype(np.float32)

    def read(self, dtype=None):
        return self.change(self.tensor.read(dtype))


def _named(family, config, tensors, architecture):
    """The tensors by their names in transformers."""
    arch = next(x for x, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    left = {name: tensor for name, tensor in tensors.items() if name != "rope_freqs.weight"}
    named, table = {}, family.table(config)
    require_sizes(config, table, tensors)
    for entry in entries(table, config):
        for theirs in entry.published:
            name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            if name in left:
                named[theirs] = _as_published(architecture, config, theirs, left.pop(name))
    return named | left  # what is left is refused by its own name


def _as_published(architecture, config, name, tensor):
    shape = tensor.shape
    if architecture == "gpt2" and len(shape) == 2 and ".h." in name:
        return _Changed(tensor, shape[::-1], np.transpose)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return _Changed(tensor, shape, lambda x: x - 1)
    if architecture == "llama" and "self_attn.q_proj" in name:
        return _Changed(tensor, shape, lambda x: _halves(x, config.shape.N))
    if architecture == "llama" and "self_attn.k_proj" in name:
        return _Changed(tensor, shape, lambda x: _halves(x, config.shape.K))
    return tensor


def _halves(x, heads):
    """Rows of pairs that turn together, back into the two halves of a head."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def is_file(path: str | os.PathLike) -> bool:
    """Whether a path is meant as a file of GGUF."""
    return os.fspath(path).endswith(SUFFIX)
