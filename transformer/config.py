"""What a transformer is made of: one frozen dataclass, and the shapes people use."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

CHOICES = {
    "positions": ("rotary", "learned", "alibi", "none"),
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "both"),
    "feed_forward": ("gelu", "swiglu", "geglu"),
    "biases": ("none", "qkv", "all"),
    "remat": ("none", "segments", "dots"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies stretch to contexts longer than those of training.

    kind: "linear" (arXiv:2306.15595), "ntk" (a larger base, by bloc97), "llama3" (Llama 3.1) or
      "yarn" (arXiv:2309.00071).
    factor: how many times longer the context becomes.
    original_max_length: the length of training; for llama3 and yarn.
    low_frequency_factor, high_frequency_factor: llama3: wavelengths over original_max_length / low
      are divided by factor, those under original_max_length / high are kept.
    beta_fast, beta_slow: yarn: rotations over the original context, above and below which a
      frequency is kept and divided.
    attention_factor: yarn: multiplies cos and sin; None: 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_max_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    KINDS = ("linear", "ntk", "llama3", "yarn")

    def __post_init__(self):
        if self.kind not in self.KINDS:
            raise ValueError(
                f"rotary scaling kind={self.kind!r}; choose one of {', '.join(self.KINDS)}."
            )
        require_types("rotary scaling ", self)
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rotary scaling factor={self.factor}; it must be at least 1.")
        if self.original_max_length < 1:
            raise ValueError(
                f"rotary scaling original_max_length={self.original_max_length}; it must be at "
                "least 1."
            )
        for low, high in (
            ("low_frequency_factor", "high_frequency_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ValueError(
                    f"rotary scaling {low}={getattr(self, low)}, {high}={getattr(self, high)}; "
                    "both are above 0, the first below the second."
                )


@dataclass(frozen=True)
class Config:
    """A transformer's architecture and how it is computed.

    vocab_size, max_length: tokens of the vocabulary, positions at most.
    num_layers, width: L and E.
    num_heads, num_kv_heads, head_size: N, K (None: N) and H (None: E / N).
    feed_forward_width: F; None: 4 E.
    positions: "rotary" (arXiv:2104.09864), "learned", "alibi" (arXiv:2108.12409) or "none".
    rotary_base, rotary_fraction, rotary_scaling: base of the frequencies, the part of each head
      that turns, and how frequencies are stretched.
    rotary_window_base: base for layers with a window (Gemma 3); None: rotary_base, and scaled.
    norm, norm_placement, norm_epsilon: RMSNorm or LayerNorm; before a sublayer, after its residual
      sum (post), or before and on its output (both, as in Gemma 2).
    feed_forward: "gelu" (tanh form), "swiglu" or "geglu" (arXiv:2002.05202).
    biases: on no projection, on q/k/v only (Qwen 2), or on all but those of experts.
    qk_norm: `norm` on each head of q and k.
    window: positions that a layer sees: None (all), a number, or a pattern of both that repeats
      over the layers, as (512, 512, None).
    attention_scale: factor on q.k; None: 1 / sqrt(H).
    attention_soft_cap, logit_soft_cap: cap * tanh(x / cap) on scores and logits; None: off.
    attention_sinks: a learned logit per head in the softmax's denominator (gpt-oss).
    parallel_residual: attention and feed-forward read the same input (GPT-J).
    tie_embeddings: the output matrix is the embedding.
    embedding_scale: factor on token embeddings (Gemma: sqrt(E)).
    num_experts, experts_per_token: mixture of experts where num_experts > 0; the top-k gates are
      renormalised by softmax over the chosen ones (Mixtral).
    scan_layers: the layers are one compiled loop; compile time stays flat in num_layers.
    remat: "none"; "segments" saves q, k, v, z and recomputes between the instructions in the
      backward pass; "dots" also saves the results of matrix products.
    dtype: "float32" or "bfloat16", in which is computed; parameters are float32.

    Raises:
      ValueError: a choice that does not exist, or sizes that do not fit together.
    """

    vocab_size: int
    max_length: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int | None = None
    head_size: int | None = None
    feed_forward_width: int | None = None
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    rotary_scaling: RotaryScaling | None = None
    rotary_window_base: float | None = None
    norm: str = "rms"
    norm_placement: str = "pre"
    norm_epsilon: float = 1e-6
    feed_forward: str = "swiglu"
    biases: str = "none"
    qk_norm: bool = False
    window: int | None | tuple[int | None, ...] = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attention_sinks: bool = False
    parallel_residual: bool = False
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 2
    scan_layers: bool = False
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self):
        fill = lambda name, value: object.__setattr__(self, name, value)
        if self.num_kv_heads is None:
            fill("num_kv_heads", self.num_heads)
        if isinstance(self.window, list):
            fill("window", tuple(self.window))
        if isinstance(self.rotary_scaling, dict):
            fill("rotary_scaling", RotaryScaling(**self.rotary_scaling))
        require_types("", self)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not exist; choose one of "
                    f"{', '.join(choices)}."
                )
        for name in (
            "vocab_size",
            "max_length",
            "num_layers",
            "width",
            "num_heads",
            "num_kv_heads",
        ):
            self._require_size(name)
        if self.head_size is None:
            if self.width % self.num_heads:
                raise ValueError(
                    f"width={self.width} is no multiple of num_heads={self.num_heads}; "
                    "change one of them, or set head_size."
                )
            fill("head_size", self.width // self.num_heads)
        if self.feed_forward_width is None:
            fill("feed_forward_width", 4 * self.width)
        self._require_size("head_size")
        self._require_size("feed_forward_width")
        self._require_size("num_experts", least=0)
        for name in ("rotary_base", "norm_epsilon", "embedding_scale"):
            self._require_positive(name)
        for name in (
            "rotary_window_base",
            "attention_scale",
            "attention_soft_cap",
            "logit_soft_cap",
        ):
            if getattr(self, name) is not None:
                self._require_positive(name)
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={self.rotary_fraction}; it is in (0, 1].")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}."
            )
        if self.positions == "rotary" and self.rotary_size % 2:
            raise ValueError(
                f"rotary positions turn pairs, and head_size={self.head_size} with "
                f"rotary_fraction={self.rotary_fraction} gives {self.rotary_size} numbers."
            )
        if self.rotary_scaling is not None and self.positions == "rotary":
            if self.rotary_scaling.kind == "ntk" and self.rotary_size == 2:
                raise ValueError("ntk stretches all but the first pair of numbers, of 1 here.")
            if self.rotary_scaling.kind == "yarn" and not self.rotary_base > 1:
                raise ValueError(f"yarn takes a rotary_base above 1, not {self.rotary_base}.")
        if not self.pattern or any(not _is_size(w) for w in self.pattern if w is not None):
            raise ValueError(
                f"window={self.window}; a window is a whole number from 1 on, or None for all, and "
                "a pattern has at least one of them."
            )
        if self.scan_layers and self.num_layers % len(self.pattern):
            raise ValueError(
                f"scan_layers repeats the window pattern of {len(self.pattern)} layers, and "
                f"num_layers={self.num_layers} is no multiple of it; set scan_layers=False."
            )
        if self.parallel_residual and self.norm_placement != "pre":
            raise ValueError(
                f"parallel_residual goes with norm_placement='pre', not {self.norm_placement!r}."
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}; with num_experts={self.num_experts} "
                f"it is between 1 and {self.num_experts}."
            )

    def _require_size(self, name, least=1):
        value = getattr(self, name)
        if not _is_size(value, least):
            raise ValueError(f"{name}={value}; it must be a whole number, at least {least}.")

    def _require_positive(self, name):
        value = getattr(self, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}; it must be above 0 and finite.")

    @property
    def pattern(self) -> tuple[int | None, ...]:
        """The windows of the layers, in the shortest pattern that repeats."""
        return self.window if isinstance(self.window, tuple) else (self.window,)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return tuple(self.pattern[n % len(self.pattern)] for n in range(self.num_layers))

    @property
    def rotary_size(self) -> int:
        """How many numbers of each head turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a jax dtype."""
        return jnp.dtype(self.dtype)

    def replace(self, **changes) -> Config:
        """The same config with some fields changed.

        Fields that were derived (head_size, feed_forward_width, num_kv_heads) keep their values.
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """A dict of plain values, for JSON; `Config(**d)` reads it back."""
        return dataclasses.asdict(self)


def require_types(where: str, values) -> None:
    """Refuses fields of a dataclass that hold another type; NumPy's numbers become Python's.

    Args:
      where: what stands before the name of a field in the message.
      values: the dataclass, which is being made.

    Raises:
      ValueError: names the field, what it holds and what it may hold.
    """
    for name, hint in _hints(type(values)).items():
        value = getattr(values, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(values, name, value)
        if not fits(value, hint):
            raise ValueError(f"{where}{name}={value!r} {wrong_type(value, hint)}")


def wrong_type(value, hint) -> str:
    """What is said of a value that does not fit a type hint."""
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    return f"is of type {type(value).__name__}; it must be {expected}."


def fits(value, hint) -> bool:
    """Whether a value is of a type hint; an int is a float too, and a bool is no number."""
    if isinstance(hint, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return isinstance(value, tuple | list) and all(fits(one, element) for one in value)
    if hint is float:
        hint = int | float
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@functools.cache
def _hints(kind):
    return typing.get_type_hints(kind)


def _is_size(value, least=1):
    return isinstance(value, int) and value >= least
