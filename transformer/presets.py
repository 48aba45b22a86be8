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


def _llama(num_layers, width, num_heads, feed_forward_width):
    """Llama 3.1 (arXiv:2407.21783)."""
    return Config(
        vocab_size=128256,
        max_length=131072,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=8,
        feed_forward_width=feed_forward_width,
        rotary_base=500_000.0,
        rotary_scaling=RotaryScaling("llama3", factor=8.0),
        norm_epsilon=1e-5,
        tie_embeddings=False,
        dtype="bfloat16",
    )


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
    "tiny-gpt2": _gpt2(2, 64, 4).replace(vocab_size=257, max_length=256),
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
    "tiny-gemma2": Config(
        vocab_size=257,
        max_length=256,
        num_layers=2,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        feed_forward="geglu",
        feed_forward_width=160,
        norm_placement="both",
        window=(32, None),
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        embedding_scale=8.0,
    ),
    "tiny-gpt-oss": Config(
        vocab_size=257,
        max_length=256,
        num_layers=2,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        rotary_scaling=RotaryScaling("yarn", factor=4.0, original_max_length=64),
        feed_forward="swiglu_clipped",
        feed_forward_width=64,
        biases="all",
        window=(32, None),
        attention_sinks=True,
        tie_embeddings=False,
        num_experts=4,
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
    "llama-8b": _llama(32, 4096, 32, 14336),
    "llama-70b": _llama(80, 8192, 64, 28672),
}
