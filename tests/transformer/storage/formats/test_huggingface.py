"""Published directories: the logits of transformers, in and out again, and what is refused."""

import json

import jax
import numpy as np
import pytest

from transformer import generate, init_cache, load, program, run, save
from transformer.storage.formats import safetensors
from transformer.storage.formats.huggingface import read_directory
from transformer.storage.meaning import function

# float32 in another order; transformers itself is as far from its own float64 as 6e-6.
TOLERANCE = 1e-4


def test_logits_are_those_of_transformers_in_both_modes(published, reference):
    model = load(published)
    tokens, logits, _ = reference(published)
    f = program(model.config)
    for chunk in (None, 1):
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
    """The same tensors under the same names, and a config that means the same."""
    model = load(published)
    save(model, tmp_path / "out", format="huggingface")
    ours = safetensors.read_header(tmp_path / "out" / "model.safetensors")
    theirs = safetensors.read_header(published / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        # Norms of Gemma lose the last bits of 1 + scale.
        np.testing.assert_allclose(ours[name].read(), tensor.read(), atol=1e-6, rtol=0)
    again = load(tmp_path / "out")
    assert function(again.config) == function(model.config)
    family = json.loads((published / "config.json").read_text())["model_type"]
    there = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert there in (family, "llama", "qwen2")  # where a simpler family computes the same
