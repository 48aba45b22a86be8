"""What a transformer is made of: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

# What has biases, for each choice of them.
_BIASED = {
    "none": (),
    "qkv": ("qkv",),
    "attention": ("qkv", "output"),
    "norms": ("norms",),
    "feed_forward": ("norms", "feed_forward"),
    "all": ("qkv", "output", "norms", "feed_forward"),
}
CHOICES = {
    "positions": ("rotary", "learned", "alibi", "none"),
    "norm": ("rms", "layer"),
    "norm_placement": ("pre", "post", "both", "output"),
    "qk_norm_over": ("head", "all"),
    "feed_forward": (
        *("gelu", "gelu_exact", "relu", "silu", "tanh"),
        *("swiglu", "geglu", "geglu_exact", "reglu", "swiglu_clipped"),
    ),
    "expert_gates": ("chosen", "all", "sigmoid", "sigmoid_all"),
    "biases": tuple(_BIASED),
    "remat": ("none", "segments", "dots"),
    "dtype": ("float32", "bfloat16", "float64"),
    "cache_dtype": (None, "int8"),
}
# How a layer lets tokens reach each other: what it writes to its blocks, and how it reads them.
LAYER_KINDS = ("attention", "latent", "delta")


class Shape(NamedTuple):
    """The sizes of a transformer by the letters that name the axes of arrays.

    V vocabulary, L layers, E width, F feed-forward width, N query heads, K key and value heads, H
    head size, X experts.
    """

    V: int
    L: int
    E: int
    F: int
    N: int
    K: int
    H: int
    X: int


@dataclass(frozen=True)
class Latent:
    """The sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are made from one latent vector a token, and that is what a cell
    holds, with one small key that carries the position and that all heads share.

    Attributes:
      rank: numbers of the latent vector (512 in DeepSeek-V2).
      query_rank: numbers of the latent vector that queries are made from; None: from x itself.
      rotary_size: numbers of the key that carries the position; even.
      value_size: numbers of a head's value; None: the head size, which is that of the part of a key
        that carries no position.
      norm_epsilon: the number under the root of the norms of latent vectors; None: that of the
        config.
    """

    rank: int
    query_rank: int | None = None
    rotary_size: int = 64
    value_size: int | None = None
    norm_epsilon: float | None = None

    def __post_init__(self):
        require_types("latent.", self)
        for name in ("rank", "query_rank", "rotary_size", "value_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"latent.{name}={value}; it must be at least 1.")
        if self.rotary_size % 2:
            raise ValueError(
                f"latent.rotary_size={self.rotary_size}; positions turn pairs of numbers, so it "
                "must be even."
            )
        if self.norm_epsilon is not None and not 0 < self.norm_epsilon < math.inf:
            raise ValueError(
                f"latent.norm_epsilon={self.norm_epsilon}; it must be above 0 and finite."
            )


@dataclass(frozen=True)
class Delta:
    """The sizes of a gated delta rule (Gated DeltaNet, arXiv:2412.06464, as in Qwen3-Next).

    Attributes:
      num_key_heads, num_value_heads: heads of queries and keys, and of values; the second is a
        multiple of the first. None: num_heads of the config.
      key_size, value_size: numbers of a head; None: the head size of the config.
      convolution: tokens that the short convolution before the rule sees, its own included.
    """

    num_key_heads: int | None = None
    num_value_heads: int | None = None
    key_size: int | None = None
    value_size: int | None = None
    convolution: int = 4

    def __post_init__(self):
        require_types("delta.", self)
        for name in dataclasses.asdict(self):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"delta.{name}={value}; it must be at least 1.")


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies stretch to contexts longer than those of training.

    Attributes:
      kind: "linear" (arXiv:2306.15595), "ntk" (a larger base, by bloc97), "llama3" (Llama 3.1),
        "yarn" (arXiv:2309.00071) or "longrope" (arXiv:2402.13753).
      factor: how many times longer the context becomes.
      original_max_length: the length of training; for llama3 and yarn.
      low_frequency_factor, high_frequency_factor: llama3: wavelengths over original_max_length /
        low are divided by factor, those under original_max_length / high are kept.
      beta_fast, beta_slow: yarn: rotations over the original context, above and below which a
        frequency is kept and divided.
      attention_factor: yarn and longrope: multiplies cos and sin; None: 0.1 ln(factor) + 1 in yarn,
        and 1 in longrope.
      truncate: yarn: whether the pairs between which frequencies change are rounded to whole ones.
      divisors: longrope: what each frequency is divided by.
    """

    kind: str
    factor: float
    original_max_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] | None = None

    KINDS = ("linear", "ntk", "llama3", "yarn", "longrope")

    def __post_init__(self):
        if isinstance(self.divisors, list):
            object.__setattr__(self, "divisors", tuple(self.divisors))
        if self.kind not in self.KINDS:
            raise ValueError(
                f"rotary_scaling.kind={self.kind!r}; choose one of {', '.join(self.KINDS)}."
            )
        require_types("rotary_scaling.", self)
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rotary_scaling.factor={self.factor}; it must be at least 1.")
        if self.original_max_length < 1:
            raise ValueError(
                f"rotary_scaling.original_max_length={self.original_max_length}; it must be at "
                "least 1."
            )
        for low, high in (
            ("low_frequency_factor", "high_frequency_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ValueError(
                    f"rotary_scaling.{low}={getattr(self, low)}, {high}={getattr(self, high)}; "
                    "both must be above 0, the first below the second."
                )
        given = self.divisors or ()
        if (self.kind == "longrope") != bool(given) or not all(0 < x < math.inf for x in given):
            raise ValueError(
                f"rotary_scaling.divisors={self.divisors}; kind='longrope' needs one for each "
                "frequency, above 0 and finite, and other kinds have none."
            )


@dataclass(frozen=True)
class Config:
    """A transformer's architecture, and how it is computed.

    A field that is None where a size belongs follows from other fields; `shape` has all sizes.

    Attributes:
      vocab_size, max_length: tokens of the vocabulary, and how many positions there are at most.
      num_layers, width: L and E.
      num_heads, num_kv_heads, head_size: N, K (None: N) and H (None: E / N).
      feed_forward_width: F; None: 4 E.
      layer_kinds: how layers let tokens reach each other, one kind or a pattern that repeats over
        the layers: "attention"; "latent" (see `Latent`); "delta" (see `Delta`). Three layers of the
        delta rule and one of attention are ("delta", "delta", "delta", "attention").
      latent, delta: the sizes of layers of these kinds.
      num_shared_kv_layers: so many layers at the end have no block of their own, but read again
        that of the last attention layer before them that has the same window (Gemma 3n).
      positions: "rotary" (arXiv:2104.09864), "learned", "alibi" (arXiv:2108.12409) or "none".
      rotary_base, rotary_fraction, rotary_scaling: the base of the frequencies, the part of each
        head that turns, and how frequencies are stretched.
      rotary_window_base, rotary_window_scaling: those of layers with a window, where they have a
        base of their own (Gemma 3); the base None: both are as in the other layers.
      norm, norm_placement, norm_epsilon: RMSNorm or LayerNorm; before a sublayer (pre), after its
        residual sum (post), on its output alone (output, as in OLMo 2), or before it and on its
        output (both, as in Gemma 2).
      feed_forward: the nonlinearity. "gelu" in its tanh form, "gelu_exact", "relu", "silu" or
        "tanh"; or, times a gate (arXiv:2002.05202), "swiglu", "geglu" in its tanh form,
        "geglu_exact", "reglu", or "swiglu_clipped" (gpt-oss).
      biases: "none"; on the projections of q, k and v ("qkv", as in Qwen 2) or all of "attention";
        on "norms", where `norm` is "layer"; on these and the "feed_forward" network, experts and
        router included; or on "all" of the layer. In latent attention those of "attention" are on
        its two projections of x and on its output (DeepSeek).
      qk_norm: whether `norm` acts on q and k.
      qk_norm_over: it acts on each "head", or on "all" heads of a token at once (OLMo 2).
      qkv_clip: the largest number, of either sign, in q, k and v, before positions turn them
        (OLMoE); None: any.
      window: how many positions a layer sees: None (all), a number, or a pattern of both that
        repeats over the layers, as (512, 512, None).
      attention_scale: the factor on q.k; None: 1 / sqrt(H).
      attention_soft_cap, logit_soft_cap: cap * tanh(x / cap) on scores and logits; None: off.
      attention_gate: whether what attention reads is multiplied by a sigmoid of x (Qwen3-Next).
      attention_sinks: whether each head has a learned logit in the softmax's denominator (gpt-oss).
      parallel_residual: whether attention and feed-forward read the same input (GPT-J).
      tie_embeddings: whether the output matrix is the embedding.
      embedding_scale: the factor on token embeddings (Gemma: sqrt(E)).
      embedding_width: numbers of a token's embedding, where a matrix makes E of them, and another
        one as many of E before the output (OPT of 350 million parameters); None: E, without these.
      num_experts, experts_per_token: a mixture of experts where num_experts > 0.
      expert_width: F of an expert; None: feed_forward_width.
      expert_gates: the gates of the chosen experts are a softmax over them (chosen, as in Mixtral),
        or what a softmax over all experts gives them (all, as in OLMoE), or the share of each in
        the sum of their sigmoids, where a bias takes part in the choice (sigmoid, DeepSeek-V3), or
        their sigmoids as they are (sigmoid_all).
      expert_scale: the factor on gates.
      expert_groups: (groups, chosen groups): experts are in groups, and only those of the best
        groups are chosen (DeepSeek-V2, arXiv:2405.04434, section 2.1.2); None: all.
      shared_expert_width: F of an expert that all tokens run through; 0: there is none.
      shared_expert_gate: whether that one has a gate (Qwen3-Next).
      num_dense_layers: so many layers at the start have no experts, but a network of their own; or
        the numbers of the layers that have none, from 0 on.
      scan_layers: whether the layers run as one compiled loop; compile time is then flat in
        num_layers.
      remat: "none"; "segments" saves what the instructions take and give, and computes the rest
        again in the backward pass; "dots" also saves the results of matrix products.
      dtype: "float32", "bfloat16" or, with JAX's jax_enable_x64, "float64": the type of
        activations. Parameters are float32.
      cache_dtype: "int8" keeps the keys and values of attention as int8 numbers, with a scale for
        each head of a cell, for generating and scoring; other kinds of layers stay as they are.
        None: in `dtype`.

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
    layer_kinds: str | tuple[str, ...] = "attention"
    latent: Latent | None = None
    delta: Delta | None = None
    num_shared_kv_layers: int = 0
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    rotary_scaling: RotaryScaling | None = None
    rotary_window_base: float | None = None
    rotary_window_scaling: RotaryScaling | None = None
    norm: str = "rms"
    norm_placement: str = "pre"
    norm_epsilon: float = 1e-6
    feed_forward: str = "swiglu"
    biases: str = "none"
    qk_norm: bool = False
    qk_norm_over: str = "head"
    qkv_clip: float | None = None
    window: int | None | tuple[int | None, ...] = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attention_gate: bool = False
    attention_sinks: bool = False
    parallel_residual: bool = False
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    embedding_width: int | None = None
    num_experts: int = 0
    experts_per_token: int = 2
    expert_width: int | None = None
    expert_gates: str = "chosen"
    expert_scale: float = 1.0
    expert_groups: tuple[int, ...] | None = None
    shared_expert_width: int = 0
    shared_expert_gate: bool = False
    num_dense_layers: int | tuple[int, ...] = 0
    scan_layers: bool = False
    remat: str = "none"
    dtype: str = "float32"
    cache_dtype: str | None = None

    def __post_init__(self):
        read = lambda name, value: object.__setattr__(self, name, value)
        for name in ("window", "layer_kinds", "expert_groups", "num_dense_layers"):
            if isinstance(getattr(self, name), list):
                read(name, tuple(getattr(self, name)))
        for name, kind in (
            ("rotary_scaling", RotaryScaling),
            ("rotary_window_scaling", RotaryScaling),
            ("latent", Latent),
            ("delta", Delta),
        ):
            if isinstance(getattr(self, name), dict):
                read(name, kind(**getattr(self, name)))
        require_types("", self)
        self._check_choices()
        self._check_sizes()
        self._check_positions()
        self._check_layers()

    def _check_choices(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not exist; choose one of "
                    f"{', '.join(map(str, choices))}."
                )
        if self.parallel_residual and self.norm_placement != "pre":
            raise ValueError(
                f"parallel_residual goes with norm_placement='pre', not {self.norm_placement!r}."
            )

    def _check_sizes(self):
        for name in ("vocab_size", "max_length", "num_layers", "width", "num_heads"):
            self._require_size(name)
        for name in (
            *("num_kv_heads", "head_size", "feed_forward_width", "expert_width"),
            "embedding_width",
        ):
            if getattr(self, name) is not None:
                self._require_size(name)
        for name in ("num_experts", "num_shared_kv_layers", "shared_expert_width"):
            self._require_size(name, least=0)
        dense = self.num_dense_layers
        if not all(_is_size(n, least=0) for n in _pattern(dense)):
            raise ValueError(
                f"num_dense_layers={dense}; it must be a whole number, at least 0, or several."
            )
        if self.head_size is None and self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} must be a multiple of num_heads={self.num_heads}, unless "
                "head_size is given; change one of them."
            )
        for name in ("rotary_base", "norm_epsilon", "embedding_scale", "expert_scale"):
            self._require_positive(name)
        for name in (
            "rotary_window_base",
            "attention_scale",
            "attention_soft_cap",
            "logit_soft_cap",
            "qkv_clip",
        ):
            if getattr(self, name) is not None:
                self._require_positive(name)
        if self.num_heads % self.shape.K:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.shape.K}: "
                "query heads share key heads evenly."
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token}; with num_experts={self.num_experts} "
                f"it must be between 1 and {self.num_experts}."
            )
        if self.num_experts and self.expert_groups is not None:
            self._check_groups()
        if self.num_dense_layers and self.scan_layers:
            raise ValueError(
                "num_dense_layers makes some layers unlike the others; set scan_layers=False."
            )

    def _check_groups(self):
        groups = self.expert_groups
        fits = len(groups) == 2 and 1 <= groups[1] <= groups[0]
        if not fits or self.num_experts % groups[0]:
            raise ValueError(
                f"expert_groups={groups}; it must be the number of groups, which divides "
                f"num_experts={self.num_experts}, and how many of them are chosen."
            )
        if self.experts_per_token > self.num_experts // groups[0] * groups[1]:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than {groups[1]} of "
                f"{groups[0]} groups hold."
            )

    def _check_positions(self):
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction}; it must be above 0, and at most 1."
            )
        if self.positions != "rotary":
            return
        if self.rotary_size % 2:
            raise ValueError(
                f"rotary positions turn pairs of numbers, and a head size of {self.shape.H} with "
                f"rotary_fraction={self.rotary_fraction} gives {self.rotary_size}; it must be even."
            )
        self._check_scaling("rotary_scaling", "rotary_base")
        self._check_scaling("rotary_window_scaling", "rotary_window_base")

    def _check_scaling(self, name, base):
        scaling = getattr(self, name)
        if scaling is None:
            return
        if getattr(self, base) is None:
            raise ValueError(f"{name} goes with {base}, which is None.")
        if scaling.divisors is not None and len(scaling.divisors) != self.rotary_size // 2:
            raise ValueError(
                f"{name}.divisors are {len(scaling.divisors)} numbers; a head that turns "
                f"{self.rotary_size} numbers needs {self.rotary_size // 2}."
            )
        if scaling.kind == "ntk" and self.rotary_size == 2:
            raise ValueError(
                f"{name}.kind='ntk' leaves the first pair of numbers as it is, and here a head has "
                "only that one; use larger heads or another scaling."
            )
        if scaling.kind == "yarn" and not getattr(self, base) > 1:
            raise ValueError(
                f"{base}={getattr(self, base)}; with {name}.kind='yarn' it must be above 1."
            )

    def _check_layers(self):
        windows, kinds = _pattern(self.window), _pattern(self.layer_kinds)
        if not windows or any(not _is_size(w) for w in windows if w is not None):
            raise ValueError(
                f"window={self.window}; a window is a whole number from 1 on, or None for all, and "
                "a pattern has at least one of them."
            )
        if not kinds or set(kinds) - set(LAYER_KINDS):
            raise ValueError(
                f"layer_kinds={self.layer_kinds!r}; a kind is one of {', '.join(LAYER_KINDS)}, and "
                "a pattern has at least one of them."
            )
        if self.cache_dtype is not None and "attention" not in kinds:
            raise ValueError(
                f"cache_dtype={self.cache_dtype!r} is for layers of attention, and there are none."
            )
        if "latent" in kinds:
            if self.latent is None:
                raise ValueError(
                    "layers of the kind 'latent' need their sizes: latent=Latent(rank=...)."
                )
            others = self.attention_sinks or self.attention_gate or self.qk_norm or self.qkv_clip
            if self.positions not in ("rotary", "none") or others:
                raise ValueError(
                    "layers of the kind 'latent' go with positions 'rotary' or 'none', without "
                    "attention_sinks, attention_gate, qk_norm and qkv_clip."
                )
        if "delta" in kinds and self.delta_sizes.num_value_heads % self.delta_sizes.num_key_heads:
            raise ValueError(
                f"delta.num_value_heads={self.delta_sizes.num_value_heads} must be a multiple of "
                f"delta.num_key_heads={self.delta_sizes.num_key_heads}."
            )
        if any(kind == "latent" and window is not None for kind, window in self.pattern):
            raise ValueError("layers of the kind 'latent' see all positions; give them no window.")
        if self.scan_layers and self.num_layers % len(self.pattern):
            raise ValueError(
                f"scan_layers repeats a pattern of {len(self.pattern)} layers, and num_layers="
                f"{self.num_layers} must be a multiple of that; set scan_layers=False."
            )
        if self.num_shared_kv_layers:
            self._check_shared()

    def _check_shared(self):
        if self.scan_layers:
            raise ValueError(
                "num_shared_kv_layers makes the last layers unlike the others; set "
                "scan_layers=False."
            )
        own = self.num_layers - self.num_shared_kv_layers
        for kind, window in self.layers[max(own, 0) :]:
            if kind == "attention" and (kind, window) not in self.layers[: max(own, 0)]:
                raise ValueError(
                    f"num_shared_kv_layers={self.num_shared_kv_layers} of {self.num_layers} "
                    f"layers: none of the layers before them is of attention with window="
                    f"{window}, so there is no block to read again."
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
    def shape(self) -> Shape:
        """All sizes, those that follow from others included."""
        return Shape(
            V=self.vocab_size,
            L=self.num_layers,
            E=self.width,
            F=self.feed_forward_width or 4 * self.width,
            N=self.num_heads,
            K=self.num_kv_heads or self.num_heads,
            H=self.head_size or self.width // self.num_heads,
            X=self.num_experts,
        )

    @property
    def delta_sizes(self) -> Delta:
        """The sizes of layers of the delta rule, none of them None."""
        given = self.delta or Delta()
        return Delta(
            num_key_heads=given.num_key_heads or self.num_heads,
            num_value_heads=given.num_value_heads or given.num_key_heads or self.num_heads,
            key_size=given.key_size or self.shape.H,
            value_size=given.value_size or self.shape.H,
            convolution=given.convolution,
        )

    @property
    def pattern(self) -> tuple[tuple[str, int | None], ...]:
        """Kind and window of each layer, in the shortest pattern that repeats."""
        kinds, windows = _pattern(self.layer_kinds), _pattern(self.window)
        period = math.lcm(len(kinds), len(windows))
        return tuple((kinds[n % len(kinds)], windows[n % len(windows)]) for n in range(period))

    @property
    def layers(self) -> tuple[tuple[str, int | None], ...]:
        """Kind and window of each layer."""
        pattern = self.pattern
        return tuple(pattern[n % len(pattern)] for n in range(self.num_layers))

    @property
    def dense_layers(self) -> frozenset[int]:
        """The numbers of the layers that have no experts, where others have them."""
        given = self.num_dense_layers
        first = range(self.num_layers)[:given] if isinstance(given, int) else given
        return frozenset(first)

    @property
    def rotary_size(self) -> int:
        """How many numbers of each head turn."""
        return int(self.shape.H * self.rotary_fraction)

    def biased(self, part: str) -> bool:
        """Whether "qkv", the "output" of attention, "norms" or the "feed_forward" have biases."""
        return part in _BIASED[self.biases]

    @property
    def sigmoid_gates(self) -> bool:
        """Whether the gates of experts are made of sigmoids."""
        return self.expert_gates in ("sigmoid", "sigmoid_all")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return "glu" in self.feed_forward

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a jax dtype."""
        return jnp.dtype(self.dtype)

    def replace(self, **changes) -> Config:
        """The same config with some fields changed."""
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


def _pattern(value):
    return value if isinstance(value, tuple) else (value,)


def _is_size(value, least=1):
    return isinstance(value, int) and value >= least
