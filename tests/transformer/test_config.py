"""Config: what does not fit together is refused, and what is derived is right."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from transformer.config import Config, RotaryScaling
from transformer.presets import presets
from transformer.program.positions import alibi_slopes, rotary_frequencies
from transformer.program.program import init_params, program

SIZES = {"vocab_size": 10, "max_length": 64, "num_layers": 4, "width": 32, "num_heads": 4}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "batch"}, "norm='batch' does not exist; choose one of rms, layer"),
        ({"width": 30}, "width=30 is no multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"head_size": 7}, "rotary positions turn pairs"),
        ({"num_layers": 0}, "num_layers=0; it must be a whole number, at least 1"),
        ({"num_layers": 2.5}, "num_layers=2.5 is of type float; it must be int"),
        ({"scan_layers": "false"}, "scan_layers='false' is of type str; it must be bool"),
        ({"tie_embeddings": None}, "tie_embeddings=None is of type NoneType; it must be bool"),
        ({"norm_epsilon": "1"}, "norm_epsilon='1' is of type str; it must be float"),
        ({"rotary_scaling": "yarn"}, "rotary_scaling='yarn' is of type str"),
        ({"rotary_scaling": {"kind": "ntk", "factor": 2.0}, "head_size": 2}, "ntk stretches"),
        ({"rotary_scaling": {"kind": "yarn", "factor": 2.0}, "rotary_base": 1.0}, "base above 1"),
        ({"head_size": 0}, "head_size=0; it must be a whole number, at least 1"),
        ({"feed_forward_width": 0}, "feed_forward_width=0"),
        ({"num_experts": -1}, "num_experts=-1; it must be a whole number, at least 0"),
        ({"window": 0}, "window=0; a window is a whole number from 1 on"),
        ({"window": ()}, r"window=\(\); .* a pattern has at least one"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0; it must be above 0 and finite"),
        ({"attention_soft_cap": -3.0}, "attention_soft_cap=-3.0; it must be above 0"),
        ({"rotary_fraction": 2.0}, r"rotary_fraction=2.0; it is in \(0, 1\]"),
        ({"rotary_base": -1.0}, "rotary_base=-1.0; it must be above 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon=nan; it must be above 0"),
        ({"window": (2, 3, None), "scan_layers": True}, "no multiple of it; set scan_layers=False"),
        ({"num_experts": 2, "experts_per_token": 3}, "between 1 and 2"),
        ({"parallel_residual": True, "norm_placement": "both"}, "goes with norm_placement='pre'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**(SIZES | fields))


def test_rotary_scaling_is_checked():
    with pytest.raises(ValueError, match="kind='cubic'; choose one of linear, ntk, llama3, yarn"):
        RotaryScaling("cubic", 2.0)
    with pytest.raises(ValueError, match=r"factor=0.5; it must be at least 1"):
        RotaryScaling("linear", 0.5)
    with pytest.raises(ValueError, match=r"factor=nan; it must be at least 1"):
        RotaryScaling("linear", float("nan"))
    with pytest.raises(ValueError, match=r"original_max_length=0; it must be at least 1"):
        RotaryScaling("yarn", 2.0, original_max_length=0)
    with pytest.raises(ValueError, match=r"low_frequency_factor=4.0, high_frequency_factor=4.0"):
        RotaryScaling("llama3", 2.0, low_frequency_factor=4.0)


def test_numbers_of_numpy_are_numbers():
    config = Config(**(SIZES | {"num_layers": np.int64(2), "norm_epsilon": np.float32(1e-5)}))
    assert type(config.num_layers) is int and type(config.norm_epsilon) is float


def test_programs_refuse_unknown_numerics_and_backends():
    with pytest.raises(ValueError, match="numerics='sloppy' does not exist"):
        program(presets["tiny"], numerics="sloppy")
    with pytest.raises(ValueError, match="attention backend 'abacus' does not exist"):
        program(presets["tiny"], attention="abacus")


@pytest.mark.parametrize("name", presets)
def test_a_config_survives_json(name):
    config = presets[name]
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config


# Parameter counts that the models' authors give, to the million.
@pytest.mark.parametrize(
    "name, millions",
    [
        ("gpt2", 124),
        ("gpt2-medium", 355),
        ("gpt2-large", 774),
        ("gpt2-xl", 1558),
        ("llama-1b", 1236),
    ],
)
def test_presets_have_the_published_size(name, millions):
    params = jax.eval_shape(partial(init_params, presets[name]), jax.random.key(0))
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == millions


def frequencies(**fields):
    return rotary_frequencies(Config(**(SIZES | {"head_size": 64} | fields)))


@pytest.mark.parametrize("kind", RotaryScaling.KINDS)
def test_scaling_keeps_fast_frequencies_and_divides_slow_ones(kind):
    plain, _ = frequencies()
    scaled, magnitude = frequencies(rotary_scaling=RotaryScaling(kind, 4.0, 1024))
    ratio = plain / scaled
    # Linear scaling divides every frequency, the others only the slow ones.
    np.testing.assert_allclose(ratio[0], 4.0 if kind == "linear" else 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-1], 4.0, rtol=1e-5)
    assert np.all(np.diff(ratio) >= -1e-6)
    expected = 0.1 * np.log(4.0) + 1 if kind == "yarn" else 1.0
    np.testing.assert_allclose(magnitude, expected, rtol=1e-6)


def test_layers_with_a_window_have_their_own_base():
    local = {"rotary_window_base": 100.0, "rotary_scaling": RotaryScaling("linear", 8.0)}
    np.testing.assert_array_equal(
        frequencies(window=8, **local)[0], frequencies(rotary_base=100.0)[0]
    )
    np.testing.assert_allclose(frequencies(**local)[0], frequencies()[0] / 8, rtol=1e-6)


def test_alibi_slopes():
    """The two examples of the paper: 8 heads, and a number that is no power of two."""
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
