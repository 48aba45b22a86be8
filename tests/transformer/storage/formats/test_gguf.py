"""Files of GGUF: the same parameters as from safetensors, and all types of numbers."""

import json

import gguf
import numpy as np
import pytest

from transformer import load
from transformer.storage.formats import safetensors
from transformer.storage.formats.gguf_file import read_file

PLAIN = ["F32", "F16", "BF16"]
QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def kind_of(name):
    return gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("name", PLAIN + QUANTISED)
def test_numbers_of_every_type_are_those_of_the_package(tmp_path, rng, name):
    kind, shape = kind_of(name), (5000, 256)  # more rows than are made floats at once
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (shape[0], shape[1] // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", stored, raw_shape=stored.shape, raw_dtype=kind)
    _finish(writer)
    _, tensors = read_file(tmp_path / "a.gguf")
    assert tensors["x"].shape == shape
    with np.errstate(all="ignore"):  # random bytes are infinite scales too
        expected = gguf.quants.dequantize(stored, kind)
        np.testing.assert_array_equal(tensors["x"].read(), expected)


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def as_gguf(published_named, tmp_path):
    """as_gguf(name, architecture, dtype) writes a published model as llama.cpp converts it."""

    def convert(name, architecture, dtype="F32"):
        directory = published_named(name)
        config = json.loads((directory / "config.json").read_text())
        path = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        _add_config(writer, config)
        arch = next(x for x, y in gguf.MODEL_ARCH_NAMES.items() if y == architecture)
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        names = gguf.get_tensor_name_map(arch, layers)
        for theirs, stored in safetensors.read_header(directory / "model.safetensors").items():
            x = _converted(architecture, config, theirs, np.array(stored.read()))
            target = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
            kind = kind_of(dtype) if x.ndim > 1 else kind_of("F32")
            data = gguf.quants.quantize(np.ascontiguousarray(x), kind)
            writer.add_tensor(target, data, raw_dtype=kind)
        _finish(writer)
        return path

    return convert


def _add_config(writer, config):
    writer.add_context_length(config.get("max_position_embeddings", config.get("n_positions")))
    writer.add_embedding_length(config.get("hidden_size", config.get("n_embd")))
    writer.add_block_count(config.get("num_hidden_layers", config.get("n_layer")))
    writer.add_head_count(config.get("num_attention_heads", config.get("n_head")))
    if "n_embd" in config:
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(size)
    writer.add_value_length(size)
    if config["model_type"] == "gemma2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])


def _converted(architecture, config, name, x):
    """What llama.cpp's converter does to a tensor."""
    if architecture == "gpt2" and ".h." in name and x.ndim == 2:
        return x.T
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return x + 1
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = next((key for part, key in heads.items() if part in name), None)
    if architecture == "llama" and key:
        rest = x.shape[1:]
        return x.reshape(config[key], 2, -1, *rest).swapaxes(1, 2).reshape(x.shape)
    return x


MODELS = [
    ("llama", "llama"),
    ("gpt2", "gpt2"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma2"),
    ("gemma3_text", "gemma3"),
]


@pytest.mark.parametrize("name, architecture", MODELS)
def test_a_model_is_the_same_as_from_safetensors(as_gguf, published_named, name, architecture):
    ours, theirs = load(as_gguf(name, architecture)), load(published_named(name))
    assert ours.config.shape == theirs.config.shape
    assert ours.config.rotary_base == theirs.config.rotary_base
    assert ours.config.rotary_window_base == theirs.config.rotary_window_base
    _assert_close(ours.params, theirs.params, 1e-6)  # Gemma's norms lose the bits of 1 + scale
    assert ours.tokenizer is None


def _assert_close(ours, theirs, tolerance):
    from transformer.storage.arrays import flat

    ours, theirs = flat(ours), flat(theirs)
    assert list(ours) == list(theirs)
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("dtype, tolerance", [("F16", 1e-3), ("BF16", 1e-2)])
def test_narrow_numbers_are_read_as_they_are(as_gguf, published_named, dtype, tolerance):
    ours, theirs = load(as_gguf("llama", "llama", dtype)), load(published_named("llama"))
    _assert_close(ours.params, theirs.params, 4 * tolerance)
    assert load(as_gguf("llama", "llama", dtype), dtype="bfloat16").config.dtype == "bfloat16"


def test_what_is_not_supported_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    _finish(writer)
    with pytest.raises(ValueError, match=r"general\.architecture='mamba' is not one that can"):
        load(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint32("llama.wings", 2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    _finish(writer)
    with pytest.raises(ValueError, match=r"keys that are not known for llama: wings"):
        load(tmp_path / "b.gguf")
    writer = gguf.GGUFWriter(tmp_path / "d.gguf", "llama")
    writer.add_rope_scaling_attn_factors(1.5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    _finish(writer)
    with pytest.raises(ValueError, match=r"attn_factor=1.5 is not supported without yarn"):
        load(tmp_path / "d.gguf")
    with pytest.raises(FileNotFoundError, match=r"c\.gguf"):
        load(tmp_path / "c.gguf")
