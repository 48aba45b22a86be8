"""The shapes that people use, by name."""

from transformer.config import Config, Delta, Latent, RotaryScaling

_GPT2 = Config(
    vocab_size=50257,
    max_length=1024,
    num_layers=12,
    width=768,
    num_heads=12,
    positions="learned",
    norm="layer",
    norm_epsilon=1e-5,
    feed_forward="gelu",
    biases="all",
)


def _gpt2(num_layers, width, num_heads):
    return _GPT2.replace(num_layers=num_layers, width=width, num_heads=num_heads)


presets: dict[str, Config] = {
    "tiny": Config(
        vocab_size=257,
        max_length=256,
        num_layers=2,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        feed_forward_width=160,
    ),
    "tiny-mla": Config(
        vocab_size=257,
        max_length=256,
        num_layers=2,
        width=64,
        num_heads=4,
        feed_forward_width=160,
        layer_kinds="latent",
        latent=Latent(rank=32, rotary_size=8),
    ),
    "tiny-hybrid": Config(
        vocab_size=257,
        max_length=256,
        num_layers=4,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        feed_forward_width=160,
        layer_kinds=("delta", "delta", "delta", "attention"),
        delta=Delta(num_key_heads=2, num_value_heads=4),
    ),
    "small": Config(
        vocab_size=4096,
        max_length=1024,
        num_layers=8,
        width=512,
        num_heads=8,
        feed_forward_width=1376,
        qk_norm=True,
    ),
    "gpt2": _GPT2,
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-1b": Config(
        vocab_size=128256,
        max_length=131072,
        num_layers=16,
        width=2048,
        num_heads=32,
        num_kv_heads=8,
        feed_forward_width=8192,
        rotary_base=500_000.0,
        rotary_scaling=RotaryScaling("llama3", factor=32.0),
        norm_epsilon=1e-5,
        dtype="bfloat16",
    ),
}
