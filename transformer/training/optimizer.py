"""Optimizers: AdamW and Muon, with warm-up, cosine decay, clipping and masked weight decay."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from transformer.program.params import Params

NAMES = ("adamw", "muon")


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    Attributes:
      name: "adamw" (arXiv:1711.05101) or "muon" (K. Jordan 2024; arXiv:2502.16982): the matrices of
        the layers by Muon, everything else by Adam.
      learning_rate: the peak, above 0.
      warmup_steps: steps of linear growth before the peak, fewer than all steps.
      final_fraction: the cosine ends at final_fraction * learning_rate; 0..1.
      b1, b2, eps: Adam's decay rates, in [0, 1), and the term in its denominator.
      weight_decay: decoupled, times the learning rate; on `layer_matrices` only.
      clip_norm: gradients of a larger global norm are scaled down to it; None: never.
      momentum: Muon's, in [0, 1).
      adam_learning_rate: the peak for what Muon leaves to Adam; None: learning_rate. Muon's updates
        are scaled to the root mean square of Adam's, so one rate goes for both.
      transfer: the width of the model that the learning rates were found for; they then go for
        other widths (muP, arXiv:2203.03466, table 3). Matrices that read the width, those of the
        layers and the output, begin smaller and take smaller steps as it grows. The head size is to
        stay, and the feed-forward width to grow with the width. None: rates are as they are given.

    Raises:
      ValueError: a name that does not exist, or a value out of its range.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    momentum: float = 0.95
    adam_learning_rate: float | None = None
    transfer: int | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(
                f"optimizer name={self.name!r} does not exist; choose one of {', '.join(NAMES)}."
            )
        rate, clip = self.adam_learning_rate, self.clip_norm
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("warmup_steps", self.warmup_steps >= 0, "0 or more")
        self._require("final_fraction", 0 <= self.final_fraction <= 1, "between 0 and 1")
        self._require("b1", 0 <= self.b1 < 1, "at least 0 and below 1")
        self._require("b2", 0 <= self.b2 < 1, "at least 0 and below 1")
        self._require("eps", self.eps > 0, "above 0")
        self._require("weight_decay", self.weight_decay >= 0, "0 or more")
        self._require("clip_norm", clip is None or clip > 0, "above 0, or None for no clipping")
        self._require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self._require("adam_learning_rate", rate is None or rate > 0, "above 0, or None")
        base = self.transfer
        self._require("transfer", base is None or base >= 1, "a width, at least 1, or None")

    def _require(self, name, holds, allowed):
        if not holds:
            raise ValueError(f"optimizer {name}={getattr(self, name)}; it must be {allowed}.")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of each step, 0..total_steps - 1.

    With w = warmup_steps it is peak * (step + 1) / (w + 1) up to step w, then a cosine
    (arXiv:1608.03983) that reaches final_fraction * peak at step total_steps.

    Raises:
      ValueError: total_steps is not more than warmup_steps.
    """
    return _schedule(config.learning_rate, config, total_steps)


def _schedule(peak, config, total_steps):
    if total_steps <= config.warmup_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} leaves nothing of {total_steps} steps; make the "
            "warm-up shorter or train for longer."
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (config.warmup_steps + 1),
        peak_value=peak,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=peak * config.final_fraction,
    )


def layer_matrices(params):
    """Which parameters are matrices of the layers: a tree like `params` of bools.

    These decay, and Muon moves them. Norms, biases and sinks do not decay, being few and having no
    redundant scale; nor do embeddings, learned positions and the output matrix, whose rows of rare
    tokens would shrink between their rare gradients (OLMo 2, arXiv:2501.00656).
    """

    return jax.tree_util.tree_map_with_path(lambda path, _: _place(path) == "layers", params)


def _place(path):
    """Where the matrix of a `Linear` is, "layers" or "output"; None for all else."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[0] if names[-1] == "weight" else None


def make_optimizer(
    config: OptimizerConfig, total_steps: int, width: int | None = None
) -> optax.GradientTransformation:
    """The optimizer of a config, for `Params` and a run of total_steps.

    Args:
      width: that of the model, which config.transfer needs.

    Raises:
      ValueError: total_steps is not more than warmup_steps, or the width is not given.
    """
    schedule = learning_rate(config, total_steps)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.transfer is not None and width is None:
        raise ValueError(f"transfer={config.transfer} needs the width of the model.")
    ratio = 1 if config.transfer is None else config.transfer / width
    smaller = [] if ratio == 1 else [_scale(layers=ratio, output=ratio)]
    if config.name == "adamw":
        decay = optax.add_decayed_weights(config.weight_decay, layer_matrices)
        update = optax.chain(adam, *smaller, decay, optax.scale_by_learning_rate(schedule))
    else:
        adam_peak = config.adam_learning_rate or config.learning_rate
        adam_schedule = _schedule(adam_peak, config, total_steps)
        update = optax.partition(
            {
                "muon": _muon(config, schedule, ratio),
                "adam": optax.chain(adam, *smaller, optax.scale_by_learning_rate(adam_schedule)),
            },
            lambda params: jax.tree.map(
                lambda matrix: "muon" if matrix else "adam", layer_matrices(params)
            ),
        )
    clip = [] if config.clip_norm is None else [clip_by_norm(config.clip_norm)]
    return optax.chain(*clip, update)


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scales a gradient whose global norm is larger than `largest` down to it.

    `update` takes the norm, where it is known already, as `norm`. The gradient is multiplied by one
    number, which XLA does where the product is used; `optax.clip_by_global_norm` divides, and of
    that XLA keeps the result, a copy of the whole gradient.
    """

    def update(gradient, state, params=None, *, norm=None, **others):
        del params, others
        norm = optax.tree.norm(gradient) if norm is None else norm
        factor = jnp.minimum(1, largest / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), gradient), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def transferred(config: OptimizerConfig, params: Params) -> Params:
    """Fresh parameters as config.transfer wants them: as they are at its width, smaller above."""
    if config.transfer is None:
        return params
    ratio = config.transfer / params.embedding.shape[1]
    return _scale(layers=ratio**0.5, output=ratio).update(params, optax.EmptyState())[0]


def _scale(**factors):
    """Multiplies matrices by the factors of their places."""

    def scale(tree, _):
        one = lambda path, x: x * factors.get(_place(path), 1)
        return jax.tree_util.tree_map_with_path(one, tree)

    return optax.stateless(scale)


def _muon(config, schedule, ratio):
    """Muon for matrices [..., in, out]; axes before those (repeats, experts) are a batch.

    Put together here because `contrib.muon` brings an Adam of its own, which has Nesterov momentum.
    """
    ends = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    dimensions = lambda params: jax.tree.map(lambda _: ends, params)
    # Gives an orthogonal matrix the root mean square of Adam's updates: arXiv:2502.16982, 2.2. The
    # length of what it changes then grows with the root of the width, where Adam's grows with it.
    scale = lambda x: 0.2 * (ratio * max(x.shape[-2:])) ** 0.5 * x
    return optax.chain(
        contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
