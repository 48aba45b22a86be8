"""Models whose matrices are kept in int8, or in panels."""

import jax
import numpy as np
import pytest

from kernels.cpu.call import is_available
from transformer import Config, Model, generate, init_cache, init_params, load, program, run, save
from transformer.data.tokenizer import byte_tokenizer
from transformer.inference.prepare import lay_out_params
from transformer.numerics.layouts import Packed
from transformer.numerics.matrix import dense, is_matrix
from transformer.numerics.quantised import is_quantised

CONFIG = Config(vocab_size=257, max_length=64, num_layers=2, width=32, num_heads=2)
# As one program: JAX compiles each operation that runs alone.
go = jax.jit(run, static_argnames=("f", "chunk"))
KINDS = {
    "tied": CONFIG,
    "scanned": CONFIG.replace(scan_layers=True, tie_embeddings=False, dtype="bfloat16"),
    "experts": CONFIG.replace(num_experts=4, experts_per_token=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_int8_computes_what_its_rounded_matrices_do(tmp_path, rng, kind):
    config = KINDS[kind]
    params = init_params(config, jax.random.key(rng.integers(2**31)))
    save(Model(config, params, byte_tokenizer()), tmp_path / "model")
    model = load(tmp_path / "model", weights="int8")
    leaves = jax.tree.leaves(model.params, is_leaf=is_quantised)
    assert is_quantised(model.params.embedding) == config.tie_embeddings
    # Query, key, value, output; but for experts up, gate, down; and what gives the logits.
    assert sum(map(is_quantised, leaves)) == {"tied": 15, "scanned": 8, "experts": 9}[kind]
    floats = jax.tree.map(dense, model.params, is_leaf=is_quantised)
    f, tokens = program(config), rng.integers(0, 257, 12).astype(np.int32)
    wanted = go(f, floats, init_cache(config, 16), tokens)[1]
    # float32 rounds sums of 32 and 88 products; bfloat16 keeps 8 bits, through two layers.
    atol = 2e-2 if kind == "scanned" else 1e-5
    for chunk in (None, 1):
        logits = go(f, model.params, init_cache(config, 16), tokens, chunk=chunk)[1]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=atol)
    if kind == "scanned":  # its types are cast before
        [completion] = generate(model, ["ab"], max_new_tokens=3, temperature=0)
        assert len(completion.tokens) == 3 or completion.finish_reason == "stop"
    if kind == "tied":
        with pytest.raises(ValueError, match="parameters in int8 are not saved"):
            save(model, tmp_path / "again")
        with pytest.raises(ValueError, match="weights='int3'; choose one of int8, panels, or None"):
            load(tmp_path / "model", weights="int3")


@pytest.mark.skipif(not is_available(), reason="kernels of a CPU, with multiply-adds")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_panels_is_the_model(tmp_path, rng, kind):
    """The same numbers, in the places where `generate` puts them; and saved as they were."""
    config = KINDS[kind]
    params = init_params(config, jax.random.key(rng.integers(2**31)))
    save(Model(config, params, byte_tokenizer()), tmp_path / "model")
    plain = load(tmp_path / "model", dtype=config.dtype)
    model = load(tmp_path / "model", dtype=config.dtype, weights="panels")
    laid_out = lay_out_params(program(config), plain.params)
    assert jax.tree.structure(model.params) == jax.tree.structure(laid_out)
    jax.tree.map(np.testing.assert_array_equal, model.params, laid_out)
    assert lay_out_params(program(config), model.params) is model.params
    leaves = jax.tree.leaves(model.params, is_leaf=is_matrix)
    assert any(isinstance(x, Packed) for x in leaves)
    texts = [generate(x, ["ab"], max_new_tokens=5, temperature=0)[0].tokens for x in (plain, model)]
    assert texts[0] == texts[1]
    save(model, tmp_path / "again")
    again = load(tmp_path / "again", dtype=config.dtype)
    jax.tree.map(np.testing.assert_array_equal, again.params, plain.params)


def test_panels_are_for_one_device(tmp_path):
    with pytest.raises(ValueError, match="for one device; leave `sharding` or it out"):
        load(tmp_path, weights="panels", sharding=lambda name: jax.devices()[0])
