"""Published directories: the logits of transformers, in and out again, and what is refused."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from transformer import Config, Model, generate, init_cache, load, program, run, save
from transformer.data.tokenizer import byte_tokenizer
from transformer.storage.formats import huggingface, safetensors
from transformer.storage.formats.huggingface import read_directory
from transformer.storage.meaning import function

# float32 in another order; transformers itself is as far from its own float64 as 6e-6.
TOLERANCE = 1e-4


# Those that read and write cells in a way of their own; others differ in what lies between.
IN_BOTH_MODES = ("gpt2", "llama", "gemma3_text", "deepseek_v3", "gpt_oss", "qwen3_next")


def test_logits_are_those_of_transformers(published, reference, request):
    """In the parallel mode, and in the sequential one too."""
    model = load(published)
    tokens, logits, _ = reference(published)
    f = program(model.config)
    both = published.name in IN_BOTH_MODES or request.config.getoption("thorough")
    for chunk in (None, 1) if both else (None,):
        compute = jax.jit(
            lambda params, cache, tokens, chunk=chunk: run(f, params, cache, tokens, chunk=chunk)
        )
        _, ours = compute(model.params, init_cache(model.config, len(tokens)), tokens)
        np.testing.assert_allclose(ours, logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_greedy_ids_are_those_of_transformers(name, published_named, reference):
    directory = published_named(name)
    tokens, _, greedy = reference(directory)
    model = load(directory)
    assert model.tokenizer is None
    [completion] = generate(model, [tokens[:8]], max_new_tokens=8, temperature=0)
    assert completion.tokens == greedy.tolist()
    assert completion.text == ""


def test_configs_of_transformers_4_mean_the_same(published, tmp_path):
    values = json.loads((published / "config.json").read_text())
    new, old = read_directory(published).config, dict(values)
    rope = old.pop("rope_parameters", {})
    if "full_attention" in rope:
        if rope["sliding_attention"]["rope_type"] != "default":
            pytest.skip("layers with a window had no scaling of their own before")
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    neox = values["model_type"] == "gpt_neox"
    if rope:
        old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            name = "rotary_pct" if neox else "partial_rotary_factor"
            old[name] = rope.pop("partial_rotary_factor")
        old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old["torch_dtype"] = old.pop("dtype")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_directory(tmp_path).config == new


def test_a_model_goes_out_as_it_came(published, tmp_path):
    """The same tensors under the same names, or those of a simpler family that is the same."""
    model = load(published)
    save(model, tmp_path / "out", format="huggingface")
    again = load(tmp_path / "out")
    assert function(again.config) == function(model.config)
    # Norms of Gemma lose the last bits of 1 + scale.
    close = partial(np.testing.assert_allclose, atol=1e-6, rtol=0)
    jax.tree.map(close, again.params, model.params)
    before, after = (
        json.loads((directory / "config.json").read_text())
        for directory in (published, tmp_path / "out")
    )
    if before["model_type"] != after["model_type"]:
        assert after["model_type"] in ("llama", "mistral", "gpt2")
        return
    if before.get("rope_interleave") is False:  # what turns is written in pairs
        return
    ours = safetensors.read_header(tmp_path / "out" / "model.safetensors")
    theirs = safetensors.read_header(published / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if "embed_positions" not in name:  # of which OPT does not use the first two rows
            close(ours[name].read(), tensor.read(), err_msg=name)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "bloom"}, "model_type='bloom' is not an architecture that can be loaded"),
        ({"wings": 2}, "keys that are not known for this architecture: wings=2"),
        ({"hidden_act": "mish"}, "hidden_act='mish' .* is not supported; it must be 'silu' or"),
        ({"hidden_size": "removed"}, "config.json: the config lacks hidden_size"),
        ({"hidden_size": "16"}, "hidden_size='16' of the config is of type str; it must be int"),
        ({"hidden_size": -16}, "config.json: width=-16; it must be a whole number"),
        ({"rms_norm_eps": 10**400}, "config.json: int too large to convert to float"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers are more than 10000"),
        ({"num_hidden_layers": 9999}, "the config has 9999 layers, and there are 21 tensors"),
        ({"vocab_size": 10**12}, "weight does not make parameters of the shape"),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 of its rope scaling is not sup",
        ),
        ({"mlp_bias": True}, "6 tensors are missing .* model.layers.0.mlp.gate_proj.bias"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config=.* of the config is not sup",
        ),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True .* is not supported"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral' .* is not supported"),
        ({"rope_parameters": {"twist": 1}}, "its rope scaling has keys .* twist=1"),
        ({"num_attention_heads": 3}, "width=16 must be a multiple of num_heads=3|multiple"),
        ({"num_hidden_layers": 3}, "9 tensors are missing .* model.layers.2."),
        ({"num_hidden_layers": 1}, "9 tensors are left over .* model.layers.1."),
        ({"tie_word_embeddings": True}, "1 tensors are left over .* lm_head.weight"),
        ({"vocab_size": 47}, r"weight has the shape \[48, 16\], and \[47, 16\]"),
        ({"intermediate_size": 20}, r"has the shape \[24, 16\], and \[20, 16\] is wanted"),
    ],
)
def test_what_is_not_supported_is_named(llama, change_config, values, message):
    change_config(llama, **values)
    with pytest.raises(ValueError, match=message):
        load(llama)


def test_what_changes_nothing_is_ignored(llama, change_config, published_named):
    change_config(llama, use_cache=False, torch_dtype="float16", id2label={"0": "a"}, top_k=50)
    assert load(llama).config == load(published_named("llama")).config


def test_a_tied_output_that_is_stored_too_is_read_once(llama, change_config):
    tensors = dict(safetensors.read_header(llama / "model.safetensors"))
    arrays = {name: np.array(tensor.read()) for name, tensor in tensors.items()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    _rewrite(llama / "model.safetensors", arrays)
    change_config(llama, tie_word_embeddings=True)
    assert load(llama).params.output is None


def test_files_without_the_prefix_are_read(llama, published_named):
    tensors = safetensors.read_header(llama / "model.safetensors")
    arrays = {name.removeprefix("model."): np.array(x.read()) for name, x in tensors.items()}
    _rewrite(llama / "model.safetensors", arrays)
    jax.tree.map(
        np.testing.assert_array_equal, load(llama).params, load(published_named("llama")).params
    )


def test_shards_are_read_by_their_index_and_written(llama, published_named, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", 8000)
    model = load(published_named("llama"))
    save(model, tmp_path / "out", format="huggingface")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out").params, model.params)
    index = tmp_path / "out" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = files[0]
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"does not say where tensor model\.norm\.weight is"):
        load(tmp_path / "out")


def test_types_are_as_stored_or_as_asked_for(llama):
    arrays = {
        k: np.array(x.read())
        for k, x in safetensors.read_header(llama / "model.safetensors").items()
    }
    for stored, dtype, expected in (
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float32"),
        ("float16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ):
        _rewrite(llama / "model.safetensors", {k: x.astype(stored) for k, x in arrays.items()})
        model = load(llama, dtype=dtype)
        layer = model.params.layers[0]
        assert model.config.dtype == layer.mixer.query.weight.dtype.name == expected
        assert layer.mixer_norm.scale.dtype == np.float32
    with pytest.raises(ValueError, match="dtype='float16'; choose one of float32, bfloat16"):
        load(llama, dtype="float16")


@pytest.mark.parametrize("weights", [None, "panels"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_prepared_meanwhile_sees_config_and_shapes(llama, dtype, weights):
    seen = []
    prepare = lambda *given: seen.append(given)
    model = load(llama, dtype=dtype, weights=weights, prepare=prepare)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert seen == [(model.config, jax.tree.map(shape, model.params))]


def test_a_config_that_transformers_does_not_have_is_refused(random_params, tmp_path):
    config = Config(
        vocab_size=8, max_length=8, num_layers=1, width=8, num_heads=2, positions="alibi"
    )
    with pytest.raises(ValueError, match=r"the nearest is .*, where positions is rotary"):
        save(Model(config, random_params(config), None), tmp_path / "x", format="huggingface")
    assert not list(tmp_path.iterdir())


def test_scanned_layers_are_written_one_by_one(random_params, tmp_path):
    config = Config(
        vocab_size=8,
        max_length=8,
        num_layers=4,
        width=8,
        num_heads=2,
        window=(3, None),
        biases="qkv",
    )
    config = config.replace(scan_layers=True)
    params = random_params(config)
    save(Model(config, params, byte_tokenizer()), tmp_path / "x", format="huggingface")
    model = load(tmp_path / "x")
    assert function(model.config) == function(config)
    np.testing.assert_array_equal(
        model.params.layers[3].mixer.key.bias, params.layers[1].mixer.key.bias[1]
    )
    assert model.tokenizer.encode("é") == [0xC3, 0xA9]
    assert model.tokenizer.begin == model.tokenizer.ends == (256,)


def _rewrite(path, arrays):
    shapes = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    safetensors.write(path, shapes, iter(arrays.values()))


def test_matrices_are_kept_in_int8_as_they_are_read(published_named, reference):
    path = published_named("llama")
    tokens, logits, _ = reference(path)
    model, rounded = load(path), load(path, weights="int8")
    size = lambda model: sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert size(rounded) < 0.6 * size(model)  # a scale for 16 numbers here, and float32 norms
    cache = init_cache(rounded.config, len(tokens))
    found = run(program(rounded.config), rounded.params, cache, tokens)[1]
    # Each of 255 steps is 0.8 % of the largest number of its group.
    assert np.abs(found - logits).max() < 0.1 * np.abs(logits).max()


def test_keys_and_values_are_kept_in_int8(published_named, reference):
    path = published_named("llama")
    tokens, logits, _ = reference(path)
    model = load(path, cache="int8")
    cache = init_cache(model.config, len(tokens))
    found = run(program(model.config), model.params, cache, tokens)[1]
    assert 0 < np.abs(found - logits).max() < 0.1 * np.abs(logits).max()
    with pytest.raises(ValueError, match="cache='int4'; choose one of int8, or None"):
        load(path, cache="int4")
