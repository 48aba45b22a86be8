"""Makes the fixtures beside this file: random tiny models of transformers, with their logits.

It needs packages that the tests do not, in an environment of its own:

    pip install torch==2.13.0 transformers==5.24.0
    python tests/transformer/storage/formats/make_fixtures.py [NAME ...]

Every parameter is random, norms, biases and sinks too, so that each one matters. Sequences are
three times as long as the window.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "fixtures"
WINDOW, TOKENS, VOCABULARY = 6, 18, 48

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NEOX = {name: x for name, x in SIZES.items() if name != "num_key_value_heads"}
OLDER = {name: x for name, x in NEOX.items() if name != "intermediate_size"}
HALF = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
LAYER_TYPES = ["sliding_attention", "full_attention"]
# Scaled so far that positions below 18 are stretched.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}

MODELS = {
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gpt2_tanh": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "activation_function": "tanh",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("Llama", SIZES | {"tie_word_embeddings": False}),
    "llama3": (
        "Llama",
        SIZES
        | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 8}
        | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    ),
    "llama_yarn": ("Llama", SIZES | {"rope_parameters": YARN, "attention_bias": True}),
    "llama_linear": (
        "Llama",
        SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "mistral": ("Mistral", SIZES | {"sliding_window": WINDOW}),
    "mixtral": (
        "Mixtral",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": (
        "Qwen2",
        SIZES | {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        SIZES
        | EXPERTS
        | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 10}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "mlp_only_layers": [1]},
    ),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 8, "attention_bias": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        SIZES | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        SIZES
        | EXPERTS
        | {"head_dim": 8, "moe_intermediate_size": 12, "norm_topk_prob": False}
        | {"mlp_only_layers": [0]},
    ),
    "gemma": ("Gemma", SIZES | {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        SIZES | {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": WINDOW},
    ),
    "gemma3_text": (
        "Gemma3",
        SIZES
        | {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": WINDOW}
        | {"attn_logit_softcapping": 2.0}  # which transformers does not apply
        | {
            "layer_types": LAYER_TYPES,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3_scaled": (
        "Gemma3",
        SIZES
        | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": LAYER_TYPES}
        | {
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
            },
        },
    ),
    "phi3": (
        "Phi3",
        SIZES
        | {"sliding_window": WINDOW, "original_max_position_embeddings": 64}
        | {
            "rope_parameters": {
                "rope_theta": 100.0,
                "rope_type": "default",
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "phi3_longrope": (
        "Phi3",
        SIZES
        | {"original_max_position_embeddings": 32, "head_dim": 4}
        | {
            "rope_parameters": {
                "rope_theta": 100.0,
                "rope_type": "longrope",
                "short_factor": [1.5, 2.5],
                "long_factor": [3.5, 4.5],
            }
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        NEOX
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "gpt_neox_serial": (
        "GPTNeoX",
        NEOX
        | {"use_parallel_residual": False, "hidden_act": "gelu_new"}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 1.0,
            }
        },
    ),
    "gpt_neox_unbiased": ("GPTNeoX", NEOX | {"attention_bias": False, "rope_parameters": HALF}),
    "opt": ("OPT", OLDER | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt_post": (
        "OPT",
        OLDER | {"ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "opt_projected": (
        "OPT",
        OLDER | {"ffn_dim": 24, "word_embed_proj_dim": 10, "do_layer_norm_before": False},
    ),
    "opt_unbiased": ("OPT", OLDER | {"ffn_dim": 24, "enable_bias": False}),
    "olmo2": ("Olmo2", SIZES),
    "olmoe": ("Olmoe", SIZES | EXPERTS | {"norm_topk_prob": False}),
    "olmoe_clipped": ("Olmoe", SIZES | EXPERTS | {"norm_topk_prob": True, "clip_qkv": 0.5}),
    "gpt_oss": (
        "GptOss",
        SIZES
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": WINDOW, "layer_types": LAYER_TYPES}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "gpt_oss_unbiased": (
        "GptOss",
        SIZES
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": WINDOW, "layer_types": LAYER_TYPES, "attention_bias": False}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        SIZES
        | {"num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8}
        | {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        | {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
        # Which the norms of latent vectors do not have.
        | {"rms_norm_eps": 1e-2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        SIZES
        | {"num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8}
        | {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2}
        | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"moe_intermediate_size": 12, "first_k_dense_replace": 1}
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v2_yarn": (
        "DeepseekV2",
        SIZES
        | {"num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8}
        | {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        | {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "attention_bias": True}
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3_halves": (
        "DeepseekV3",
        SIZES
        | {"num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8}
        | {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False}
        | {"moe_intermediate_size": 12, "first_k_dense_replace": 1, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "qwen3_next": (
        "Qwen3Next",
        SIZES
        | EXPERTS
        | {"head_dim": 8, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "norm_topk_prob": True}
        | {"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 3}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
}


def make(name: str) -> None:
    """Writes one fixture: config.json, model.safetensors and reference.npz."""
    family, options = MODELS[name]
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
    randomize(model, sorted(MODELS).index(name))
    tokens = torch.randint(2, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits[0]
        greedy = model.generate(tokens[:, :8], max_new_tokens=8, do_sample=False, eos_token_id=None)
    directory = HERE / name
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        directory / "reference.npz",
        tokens=tokens[0].numpy().astype(np.int32),
        logits=logits.numpy(),
        greedy=greedy[0, 8:].numpy().astype(np.int32),
    )
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{name}: {size // 1024} KiB, deviation of logits {logits.std():.2f}")


CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def randomize(model, seed: int) -> None:
    """Gives every parameter random numbers of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in {**dict(model.named_parameters()), **choice_biases(model)}.items():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith("weight") and ("norm" in name or "ln_" in name)
        if parameter.ndim > 1:
            noise /= parameter.shape[-1] ** 0.5
        elif is_scale:
            noise = parameter.detach() + 0.3 * noise
        else:
            noise *= 0.3
        parameter.data.copy_(noise)


def choice_biases(model):
    """DeepSeek-V3's biases of the choice of experts, which are buffers."""
    return {name: x for name, x in model.named_buffers() if name.endswith("correction_bias")}


if __name__ == "__main__":
    for each in sys.argv[1:] or MODELS:
        make(each)
