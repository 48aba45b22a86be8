"""Rotary positions in published configs, in the form of transformers 4 and in that of 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformer.config import RotaryScaling
from transformer.storage.formats.fields import Fields

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rotary:
    """Base, part of a head that turns, and scaling.

    Attributes:
      base: where the config names none.
      partial: whether a part of a head can turn; transformers ignores the key elsewhere.
      fraction: the part, where the config names none.
      base_key, fraction_key: what transformers 4 calls them.
      local_base: of layers with a window, where these have one of their own (Gemma 3).
      scaling: where the config names none.
    """

    base: float = 10_000.0
    partial: bool = False
    fraction: float = 1.0
    base_key: str = "rope_theta"
    fraction_key: str = "partial_rotary_factor"
    local_base: float | None = None
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def read(self, fields: Fields, found: dict) -> None:
        """Reads `rope_parameters`, or else `rope_theta` and `rope_scaling`."""
        old = {
            "rope_theta": fields.take(self.base_key, float | None, None),
            "partial_rotary_factor": fields.take(self.fraction_key, float | None, None),
        }
        old = {key: x for key, x in old.items() if x is not None}
        scaling = fields.take("rope_scaling", dict | None, None) or {}
        given = fields.take("rope_parameters", dict | None, None) or {}
        original = fields.take("original_max_position_embeddings", int | None, None)
        local = {}
        if GLOBAL in given or LOCAL in given:
            if not self.local_base:
                raise fields.refused(
                    "rope_parameters for each kind of layer", "here all layers have the same"
                )
            kinds = Fields(given, "its rope_parameters")
            given, local = (kinds.take(kind, dict | None, None) or {} for kind in (GLOBAL, LOCAL))
            kinds.finish()
        if self.local_base:
            base = fields.take("rope_local_base_freq", float, self.local_base)
            found["rotary_window_base"], _, found["rotary_window_scaling"] = _read(
                {"rope_theta": base} | local, self, found, original
            )
        found["rotary_base"], found["rotary_fraction"], found["rotary_scaling"] = _read(
            old | (scaling or given or dict(self.scaling)) | given, self, found, original
        )

    def write(self, config, values):
        """Writes `rope_parameters`, and for older readers `rope_theta` and `rope_scaling`."""
        rope = {"rope_theta": config.rotary_base, "rope_type": "default"}
        if config.rotary_fraction != 1:
            rope["partial_rotary_factor"] = config.rotary_fraction
        scaling = _written(config.rotary_scaling)
        rope |= scaling
        values[self.base_key] = config.rotary_base
        if self.fraction != 1 or config.rotary_fraction != 1:
            values[self.fraction_key] = config.rotary_fraction
        values["rope_scaling"] = scaling or None
        if self.local_base:
            base, scaling = config.rotary_window_base, config.rotary_window_scaling
            if base is None:
                base, scaling = config.rotary_base, config.rotary_scaling
            values["rope_local_base_freq"] = base
            local = {"rope_theta": base, "rope_type": "default"} | _written(scaling)
            rope = {GLOBAL: rope, LOCAL: local}
        values["rope_parameters"] = rope


def _read(keys, default, found, original):
    """Base, part of a head that turns, and scaling, from the keys of some layers."""
    rope = Fields(keys, "its rope scaling")
    kind = rope.take("type", str, "default")
    kind = rope.take("rope_type", str, kind)
    base = rope.take("rope_theta", float, default.base)
    if not default.partial:
        rope.only("partial_rotary_factor", 1.0)
    fraction = rope.take("partial_rotary_factor", float, default.fraction)
    scaling = _scaling(kind, rope, found, original)
    rope.finish()
    return base, fraction, scaling


def _scaling(kind, rope, found, original):
    """The scaling of a kind, from the keys that are left; None where there is none."""
    if kind == "default":
        rope.drop("factor", "original_max_position_embeddings")
        return None
    if kind == "dynamic":
        # It begins beyond the length of training, and that is where max_length ends.
        rope.drop("factor", "original_max_position_embeddings")
        return None
    if kind == "linear":
        rope.drop("original_max_position_embeddings")
        return RotaryScaling("linear", rope.take("factor", float))
    before = found["max_length"]
    before = rope.take("original_max_position_embeddings", int, original or before)
    if kind == "llama3":
        return RotaryScaling(
            "llama3",
            rope.take("factor", float),
            before,
            low_frequency_factor=rope.take("low_freq_factor", float),
            high_frequency_factor=rope.take("high_freq_factor", float),
        )
    if kind == "yarn":
        return _yarn(rope, before, found["max_length"])
    if kind in ("longrope", "su"):
        return _longrope(rope, before, found)
    raise rope.refused(
        f"rope_type={kind!r}", "it must be default, dynamic, linear, llama3, yarn or longrope"
    )


def _yarn(rope, original, max_length):
    factor = rope.take("factor", float | None, None) or max_length / original
    magnitude = rope.take("attention_factor", float | None, None)
    own, of_all = (rope.take(k, float | None, None) for k in ("mscale", "mscale_all_dim"))
    if magnitude is None and own and of_all:
        root = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
        magnitude = root(own) / root(of_all)
    return RotaryScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.take("beta_fast", float | None, None) or 32.0,
        beta_slow=rope.take("beta_slow", float | None, None) or 1.0,
        attention_factor=magnitude,
        truncate=rope.take("truncate", bool, True),
    )


def _longrope(rope, original, found):
    """Phi-3's: up to the length of training, beyond which all frequencies would change at once.

    A program knows its position, and not how long the sequence will be, so max_length ends there.
    """
    rope.drop("long_factor")
    factor = rope.take("factor", float | None, None) or found["max_length"] / original
    magnitude = rope.take("attention_factor", float | None, None)
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = tuple(float(x) for x in rope.take("short_factor", tuple[float, ...]))
    found["max_length"] = original
    return RotaryScaling(
        "longrope", factor, original, attention_factor=magnitude, divisors=divisors
    )


def _written(scaling):
    """The keys of a scaling; none where there is none."""
    if scaling is None:
        return {}
    keys = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        keys["original_max_position_embeddings"] = scaling.original_max_length
    if scaling.kind == "llama3":
        keys["low_freq_factor"] = scaling.low_frequency_factor
        keys["high_freq_factor"] = scaling.high_frequency_factor
    if scaling.kind == "yarn":
        keys |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        keys["truncate"] = scaling.truncate
    if scaling.kind == "longrope":
        keys["short_factor"] = keys["long_factor"] = list(scaling.divisors)
    if scaling.attention_factor is not None:
        keys["attention_factor"] = scaling.attention_factor
    return keys
