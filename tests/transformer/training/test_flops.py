"""FLOPs of a model, by hand."""

import functools

import jax

from transformer.config import Config
from transformer.presets import presets
from transformer.training.flops import flops_per_token, peak_flops

TINY = Config(vocab_size=11, max_length=16, num_layers=2, width=16, num_heads=4, num_kv_heads=2)


def test_flops_of_gpt2_by_hand():
    matrices = 12 * 12 * 768**2 + 50257 * 768
    vectors = 12 * (2 * 2 * 768 + (3 + 1 + 4 + 1) * 768) + 2 * 768
    attention = 12 * 12 * 768 * 1000  # 12 L N H T
    assert flops_per_token(presets["gpt2"], 1000) == 6 * (matrices + vectors) + attention


def test_flops_count_windows_and_chosen_experts_and_no_lookup():
    flops = functools.partial(flops_per_token, length=100)
    base = flops(TINY)
    assert flops(TINY.replace(tie_embeddings=False)) == base
    assert flops(TINY.replace(scan_layers=True)) == base
    assert base - flops(TINY.replace(window=(10, None))) == 12 * 16 * 90
    chosen = [flops(TINY.replace(num_experts=8, experts_per_token=k)) for k in (1, 2)]
    assert chosen[1] - chosen[0] == 6 * 2 * 3 * 16 * 64  # L layers of three matrices [E, F]


def test_peak_flops_of_devices():
    device = lambda kind: type("Device", (), {"device_kind": kind})
    assert peak_flops(device("NVIDIA H100 80GB HBM3")) == 989.4e12
    assert peak_flops(device("TPU v5 lite")) == 197e12
    assert peak_flops(device("TPU v5")) == 459e12
    assert peak_flops(jax.devices("cpu")[0]) is None
