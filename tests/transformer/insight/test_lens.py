"""Lenses: the last layer's is the model, and tuning brings the others nearer to it."""

import jax
import jax.numpy as jnp
import numpy as np

from transformer.insight import TunedLens, lens, tune


def test_the_lens_of_the_last_layer_is_the_model(model, look):
    f, params, cache, tokens = model("attention", num_layers=3)
    seen = look(f, params, cache, tokens)
    read = jax.jit(lambda tuned: lens(f, params, seen, tuned))
    made = read(None)
    assert made.shape == (3, 10, 31)
    np.testing.assert_allclose(made[-1], seen.logits, atol=1e-4)  # float32, compiled otherwise
    zeros = TunedLens.zeros(3, 16)
    np.testing.assert_allclose(read(zeros), made, atol=1e-5)  # float32, compiled otherwise


def test_a_tuned_lens_is_nearer_and_comes_back_from_its_file(model, look, tmp_path):
    f, params, cache, tokens = model("attention")
    seen = look(f, params, cache, tokens)
    tuned = tune(f, params, tokens[None], steps=30, learning_rate=1e-2)

    @jax.jit
    def divergence(tuned):
        guess = jax.nn.log_softmax(lens(f, params, seen, tuned)[0])
        truth = jax.nn.log_softmax(seen.logits)
        return (jnp.exp(truth) * (truth - guess)).sum(-1).mean()

    assert divergence(tuned) < 0.8 * divergence(None)
    tuned.save(tmp_path / "lens.npz")
    same = TunedLens.load(tmp_path / "lens.npz")
    np.testing.assert_array_equal(same.matrices, tuned.matrices)
