"""Whether two configs describe the same model, whatever their fields look like."""

import dataclasses

from transformer.config import Config

# Fields of `Config` that change how the function is computed, but neither what it is nor its
# parameters; and those that `layers` says.
_COMPUTATION = {"remat", "dtype", "cache_dtype"}
_PATTERNS = {"window", "layer_kinds"}


def meaning(config: Config) -> dict:
    """The fields that say what a model is; a size that follows from others is that size."""
    sizes = {
        "num_kv_heads": config.shape.K,
        "head_size": config.shape.H,
        "feed_forward_width": config.shape.F,
    }
    fields = config.to_dict() | sizes
    if config.latent is not None and config.latent.norm_epsilon is None:
        fields["latent"]["norm_epsilon"] = config.norm_epsilon
    return {name: value for name, value in fields.items() if name not in _COMPUTATION}


def function(config: Config) -> dict:
    """`meaning` without what makes no difference to what is computed for a token."""
    fields = meaning(config)
    unused = set(_PATTERNS) | {"scan_layers"}
    kinds, windows = zip(*config.layers, strict=True)
    if config.positions != "rotary":
        unused |= {name for name in fields if name.startswith("rotary_")}
    if not any(windows) or config.rotary_window_base is None:
        unused |= {"rotary_window_base", "rotary_window_scaling"}
    if not config.num_experts:
        unused |= {name for name in fields if "expert" in name} | {"num_dense_layers"}
    fields["expert_width"] = config.expert_width or config.shape.F
    dense = sorted(config.dense_layers.intersection(range(config.num_layers)))
    fields["num_dense_layers"] = dense
    if config.num_experts and not dense:
        unused.add("feed_forward_width")
    if not config.shared_expert_width:
        unused.add("shared_expert_gate")
    if not config.qk_norm:
        unused.add("qk_norm_over")
    if "latent" not in kinds:
        unused.add("latent")
    if "delta" not in kinds:
        unused.add("delta")
    fields["attention_scale"] = config.attention_scale or config.shape.H**-0.5
    for name in ("rotary_scaling", "rotary_window_scaling"):
        fields[name] = _scaling(getattr(config, name))
    fields["embedding_width"] = config.embedding_width or config.width
    fields["layers"] = config.layers
    return {name: value for name, value in fields.items() if name not in unused}


_READ = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "llama3": ("factor", "original_max_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": (
        "factor",
        "original_max_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
    "longrope": ("divisors", "attention_factor"),
}


def _scaling(scaling):
    """What of a scaling is read."""
    if scaling is None:
        return None
    fields = dataclasses.asdict(scaling)
    return {"kind": scaling.kind} | {name: fields[name] for name in _READ[scaling.kind]}


def differences(there: dict, here: dict) -> list[str]:
    """The fields in which two meanings differ, as words."""
    return [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in here
        if there.get(name) != here.get(name)
    ]
