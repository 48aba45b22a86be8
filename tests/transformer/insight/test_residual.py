"""The residual stream: made from the reads alone, it ends where the program ends."""

import jax
import numpy as np
import pytest

from transformer.insight import hooks, lens, stream, trace


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("attention", {"norm_placement": "both", "logit_soft_cap": 5.0}),
        ("attention", {"norm_placement": "post", "num_experts": 3}),
        ("scanned", {}),
        ("latent", {"parallel_residual": True}),
        ("hybrid", {}),
        ("shared", {}),
    ],
)
def test_it_ends_in_the_logits(kind, changes, model):
    f, params, cache, tokens = model(kind, **changes)

    @jax.jit
    def looked():
        seen = trace(f, params, cache, tokens)
        return seen, stream(f, params, seen), lens(f, params, seen)[-1]

    seen, made, logits = looked()
    np.testing.assert_allclose(logits, seen.logits, atol=1e-4)  # float32, compiled otherwise
    np.testing.assert_array_equal(made.before[1:], made.after[:-1])
    assert made.mixers.shape == made.middle.shape == (f.config.num_layers, 10, 16)
    if changes.get("norm_placement") is None and not f.config.parallel_residual:
        np.testing.assert_allclose(made.middle + made.feed_forwards, made.after, atol=1e-5)


def test_a_program_of_ones_own_has_none():
    with pytest.raises(TypeError, match="was not made by program"):
        stream(lambda: None, None, None)


def test_hooks_have_the_names_of_transformer_lens(model, look):
    f, params, cache, tokens = model("gpt2")
    seen = look(f, params, cache, tokens)
    found = hooks(f, params, seen)
    assert found["blocks.1.hook_resid_post"].here == "stream.after[1]"
    shapes = {
        "hook_embed": (10, 16),
        "blocks.0.attn.hook_q": (10, 4, 4),
        "blocks.1.attn.hook_k": (10, 4, 4),
        "blocks.1.attn.hook_pattern": (4, 10, 10),
        "blocks.0.hook_resid_mid": (10, 16),
    }

    _values_are_what_names_say(f, params, seen, found, shapes)
    f, params, cache, tokens = model("attention")
    assert "blocks.0.attn.hook_rot_q" in hooks(f, params, look(f, params, cache, tokens))


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (
            "latent",
            {
                "blocks.1.attn.hook_kv_latent": (10, 8),
                "blocks.1.attn.hook_rot_k": (10, 4),
                "blocks.1.attn.hook_rot_q": (10, 4, 4),
                "blocks.1.attn.hook_pattern": (4, 10, 10),
                "blocks.1.attn.hook_z": (10, 4, 4),
            },
        ),
        (
            "hybrid",
            {
                "blocks.0.linear_attn.hook_q": (10, 4, 4),
                "blocks.0.linear_attn.hook_v": (10, 4, 4),
                "blocks.0.linear_attn.hook_log_decay": (10, 4),
                "blocks.0.linear_attn.hook_beta": (10, 4),
                "blocks.0.linear_attn.hook_recurrence_out": (10, 4, 4),
                "blocks.1.attn.hook_pattern": (4, 10, 10),
            },
        ),
        (
            "shared",
            {
                "blocks.2.attn.hook_rot_q": (10, 4, 4),
                "blocks.2.attn.hook_pattern": (4, 10, 10),
                "blocks.2.attn.hook_z": (10, 4, 4),
            },
        ),
    ],
)
def test_hooks_of_other_layers(kind, shapes, model, look):
    f, params, cache, tokens = model(kind)
    seen = look(f, params, cache, tokens)
    found = hooks(f, params, seen)
    assert "blocks.1.hook_resid_mid" in found
    names = [hook.here for hook in found.values()]
    assert len(set(names)) == len(names)  # so that there is a way back
    _values_are_what_names_say(f, params, seen, found, shapes)


def _values_are_what_names_say(f, params, seen, found, shapes):
    @jax.jit
    def both():
        names = {"seen": seen, "stream": stream(f, params, seen)}
        return {name: (found[name].value(), eval(found[name].here, names)) for name in shapes}

    for name, (value, here) in both().items():
        assert value.shape == shapes[name]
        np.testing.assert_allclose(here, value, atol=1e-5)  # float32, compiled otherwise
