"""Config: what does not fit together is refused, and what is derived is right."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer.config import Config, Delta, Latent, RotaryScaling

LATENT = {"layer_kinds": "latent", "latent": Latent(rank=8)}
SIZES = {"vocab_size": 10, "max_length": 64, "num_layers": 4, "width": 32, "num_heads": 4}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "batch"}, "norm='batch' does not exist; choose one of rms, layer"),
        ({"width": 30}, "width=30 must be a multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_size": 7}, "rotary positions turn pairs"),
        ({"num_layers": 0}, "num_layers=0; it must be a whole number, at least 1"),
        ({"num_layers": 2.5}, "num_layers=2.5 is of type float; it must be int"),
        ({"scan_layers": "false"}, "scan_layers='false' is of type str; it must be bool"),
        ({"tie_embeddings": None}, "tie_embeddings=None is of type NoneType; it must be bool"),
        ({"norm_epsilon": "1"}, "norm_epsilon='1' is of type str; it must be float"),
        ({"rotary_scaling": "yarn"}, "rotary_scaling='yarn' is of type str"),
        (
            {"rotary_scaling": {"kind": "ntk", "factor": 2.0}, "head_size": 2},
            "leaves the first pair of numbers",
        ),
        (
            {"rotary_scaling": {"kind": "yarn", "factor": 2.0}, "rotary_base": 1.0},
            "rotary_base=1.0; with rotary_scaling.kind='yarn' it must be above 1",
        ),
        ({"head_size": 0}, "head_size=0; it must be a whole number, at least 1"),
        ({"feed_forward_width": 0}, "feed_forward_width=0"),
        ({"num_experts": -1}, "num_experts=-1; it must be a whole number, at least 0"),
        ({"window": 0}, "window=0; a window is a whole number from 1 on"),
        ({"window": ()}, r"window=\(\); .* a pattern has at least one"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0; it must be above 0 and finite"),
        ({"attention_soft_cap": -3.0}, "attention_soft_cap=-3.0; it must be above 0"),
        ({"rotary_fraction": 2.0}, "rotary_fraction=2.0; it must be above 0, and at most 1"),
        ({"rotary_base": -1.0}, "rotary_base=-1.0; it must be above 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon=nan; it must be above 0"),
        (
            {"window": (2, 3, None), "scan_layers": True},
            "a multiple of that; set scan_layers=False",
        ),
        (
            {"num_experts": 2, "experts_per_token": 3},
            "experts_per_token=3; with num_experts=2 it must be between 1 and 2",
        ),
        (
            {"layer_kinds": "mamba"},
            "layer_kinds='mamba'; a kind is one of attention, latent, delta",
        ),
        ({"layer_kinds": ()}, r"layer_kinds=\(\); .* a pattern has at least one"),
        ({"layer_kinds": "latent"}, r"need their sizes: latent=Latent\(rank=...\)"),
        (LATENT | {"positions": "alibi"}, "go with positions 'rotary' or 'none'"),
        (LATENT | {"qk_norm": True}, "without attention_sinks, attention_gate, qk_norm and qkv"),
        (LATENT | {"window": 8}, "see all positions; give them no window"),
        (
            {"layer_kinds": "delta", "delta": {"num_key_heads": 3, "num_value_heads": 4}},
            "num_value_heads=4 must be a multiple of delta.num_key_heads=3",
        ),
        ({"num_shared_kv_layers": -1}, "num_shared_kv_layers=-1; it must be a whole number"),
        ({"num_shared_kv_layers": 2, "scan_layers": True}, "unlike the others; set scan_layers"),
        ({"num_shared_kv_layers": 4}, "there is no block to read again"),
        ({"num_shared_kv_layers": 1, "window": (8, 8, 8, None)}, "attention with window=None"),
        (
            {"rotary_scaling": RotaryScaling("longrope", 1.0, divisors=(2.0,))},
            "rotary_scaling.divisors are 1 numbers; a head that turns 8 numbers needs 4",
        ),
        ({"num_experts": 4, "expert_groups": (3, 1)}, r"expert_groups=\(3, 1\); it must be"),
        (
            {"num_experts": 4, "experts_per_token": 3, "expert_groups": (2, 1)},
            "experts_per_token=3 is more than 1 of 2 groups hold",
        ),
        ({"num_dense_layers": 1, "scan_layers": True}, "num_dense_layers makes some layers"),
        ({"num_dense_layers": (0, -1)}, r"num_dense_layers=\(0, -1\); it must be a whole number"),
        ({"qkv_clip": 0.0}, "qkv_clip=0.0; it must be above 0"),
        ({"embedding_width": 0}, "embedding_width=0; it must be a whole number, at least 1"),
        (
            {"rotary_window_scaling": RotaryScaling("linear", 2.0)},
            "rotary_window_scaling goes with rotary_window_base, which is None",
        ),
        ({"expert_gates": "hard"}, "expert_gates='hard' does not exist; choose one of chosen, all"),
        ({"parallel_residual": True, "norm_placement": "both"}, "goes with norm_placement='pre'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**(SIZES | fields))


def test_layers_without_experts_are_the_first_ones_or_those_named():
    config = Config(**SIZES, num_experts=2, num_dense_layers=2)
    assert config.dense_layers == {0, 1}
    assert config.replace(num_dense_layers=(1, 3)).dense_layers == {1, 3}
    assert config.replace(num_dense_layers=10**30).dense_layers == {0, 1, 2, 3}


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


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Latent, {"rank": 0}, "latent.rank=0; it must be at least 1"),
        (Latent, {"rank": 8.5}, "latent.rank=8.5 is of type float; it must be int"),
        (Latent, {"rank": 8, "rotary_size": 3}, "latent.rotary_size=3; .* it must be even"),
        (Latent, {"rank": 8, "query_rank": -1}, "latent.query_rank=-1; it must be at least 1"),
        (Delta, {"convolution": 0}, "delta.convolution=0; it must be at least 1"),
        (Delta, {"key_size": "8"}, "delta.key_size='8' is of type str"),
    ],
)
def test_sizes_of_a_kind_of_layer_are_checked(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_what_is_left_out_follows_from_other_fields_also_after_they_change():
    config = Config(**SIZES)
    assert (config.num_kv_heads, config.head_size, config.feed_forward_width) == (None,) * 3
    assert config.shape == (10, 4, 32, 128, 4, 4, 8, 0)  # V L E F N K H X
    wider = config.replace(width=64, num_heads=2, num_experts=3)
    assert wider.shape == (10, 4, 64, 256, 2, 2, 32, 3)
    given = config.replace(num_kv_heads=2, head_size=16, feed_forward_width=9, width=64)
    assert given.shape == (10, 4, 64, 9, 4, 2, 16, 0)


def test_sizes_of_the_delta_rule_follow_from_the_heads():
    assert Config(**SIZES).delta_sizes == Delta(4, 4, 8, 8, 4)
    given = Config(**SIZES, delta=Delta(num_key_heads=2, value_size=16, convolution=2))
    assert given.delta_sizes == Delta(2, 2, 8, 16, 2)


KINDS = st.one_of(st.sampled_from(["attention", "delta"]), st.lists(
    st.sampled_from(["attention", "delta"]), min_size=1, max_size=4))  # fmt: skip
WINDOWS = st.one_of(st.none(), st.integers(1, 9), st.lists(
    st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=3))  # fmt: skip


@given(kinds=KINDS, windows=WINDOWS, num_layers=st.integers(1, 13))
def test_patterns_repeat_over_the_layers(kinds, windows, num_layers):
    config = Config(**(SIZES | {"num_layers": num_layers}), layer_kinds=kinds, window=windows)
    kinds, windows = (x if isinstance(x, list) else [x] for x in (kinds, windows))
    expected = [(kinds[n % len(kinds)], windows[n % len(windows)]) for n in range(num_layers)]
    assert list(config.layers) == expected
    assert len(config.pattern) == np.lcm(len(kinds), len(windows))


@pytest.mark.parametrize(
    "config",
    [
        Config(**SIZES),
        Config(**SIZES, window=(8, None), rotary_scaling=RotaryScaling("yarn", 2.0)),
        Config(**SIZES, **LATENT),
        Config(**SIZES, layer_kinds=("delta", "attention"), delta=Delta(key_size=4)),
    ],
)
def test_a_config_survives_json(config):
    again = Config(**json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
