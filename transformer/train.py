"""Training: the loss in the parallel mode, the step that follows its gradient, evaluation."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from transformer.cache import Cache
from transformer.config import Config
from transformer.data import Batch
from transformer.program import Params, init_cache, init_params, program
from transformer.schedule import parallel


@struct.dataclass
class TrainState:
    """All that a training step changes.

    step: int32, how many steps have been taken.
    params, optimizer_state: the parameters, and what the optimizer remembers of their gradients.
    ema: exponential moving average of the parameters; None where it is not kept.
    """

    step: jax.Array
    params: Params
    optimizer_state: optax.OptState
    ema: Params | None = None


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    ema_decay: float | None = None,
) -> TrainState:
    """The state before the first step; the average starts at the initial parameters."""

    @jax.jit  # one program, where every parameter by itself would be several
    def init(key):
        params = init_params(config, key)
        ema = None if ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

    return init(key)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy and log-sum-exp of logits.

    Args:
      logits: [..., V] float32 (or wider).
      targets: [...] int32 in 0..V-1.

    Returns:
      nll [...] in nats, the log-sum-exp minus the target's logit; and the log-sum-exp [...].
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return lse - target, lse


def _cross_entropy_fwd(logits, targets):
    nll, lse = cross_entropy(logits, targets)
    return (nll, lse), (logits, targets, lse)


# Left to JAX, the gradient would be a sum of two arrays [..., V], one of them a scatter into zeros.
def _cross_entropy_bwd(residuals, cotangents):
    logits, targets, lse = residuals
    dnll, dlse = (x[..., None] for x in cotangents)
    softmax = jnp.exp(logits - lse[..., None])
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    return softmax * (dnll + dlse) - jnp.where(is_target, dnll, 0), None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def compute_logits(f, params, cache, batch):
    """Logits [B, T, V]: each row in the parallel mode, from the same empty cache."""
    length = batch.tokens.shape[1]
    cells = jnp.arange(length, dtype=jnp.int32)
    if batch.positions is None:
        row = lambda tokens: parallel(f, params, cache, tokens, cells)[1]
        return jax.vmap(row)(batch.tokens)
    row = lambda tokens, positions: parallel(f, params, cache, tokens, positions, cells)[1]
    return jax.vmap(row)(batch.tokens, batch.positions)


def loss(
    f: Callable,
    params,
    cache: Cache,
    batch: Batch,
    z_loss: float = 0.0,
    total_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The objective of training, a mean over targets in proportion to their weights.

    Args:
      f, params: the program and its parameters.
      cache: an empty cache for one sequence, with room for T positions.
      batch: arrays [B, T]. positions None: every row is one document, without packing.
      z_loss: factor of the squared log-sum-exp that keeps logits near 0 (PaLM, arXiv:2204.02311,
        section 5).
      total_weight: what the sums are divided by; None: the sum of the batch's weights. A part of a
        larger batch takes that of the whole.

    Returns:
      (mean of nll + z_loss * lse^2, mean of nll), in nats.
    """
    if total_weight is None:
        total_weight = jnp.sum(batch.weights)
    nll, lse = cross_entropy(compute_logits(f, params, cache, batch), batch.targets)
    mean = lambda x: jnp.sum(x * batch.weights) / total_weight
    nll_mean = mean(nll)
    return nll_mean + z_loss * mean(jnp.square(lse)) if z_loss else nll_mean, nll_mean


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    *,
    attention: str = "auto",
    accumulate: int = 1,
    z_loss: float = 0.0,
    ema_decay: float | None = None,
    state_shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a compiled `train_step(state, batch) -> (state, metrics)`, which donates the state.

    Metrics are scalars: `loss` (nats per target, without the z-loss), `gradient_norm` (before
    clipping) and `finite` (bool). Where loss or gradient norm is not finite, as with a token id
    outside of the vocabulary, the state comes back unchanged, its step too, and `finite` is False.

    Args:
      config, optimizer: the model and `make_optimizer`'s result.
      attention: the backend of `kernels.attention`.
      accumulate: parts that a batch is run in, one after another; it divides B. The gradient is
        that of the whole batch.
      z_loss: as in `loss`.
      ema_decay: of the state's moving average, in (0, 1); None: the state has none.
      state_shardings: where the new state lies on several devices, as `sharding.state_shardings`.

    Raises:
      ValueError: accumulate or ema_decay out of range; while tracing, B is no multiple of
        accumulate, T exceeds config.max_length, or the state's average does not go with ema_decay.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}; a batch is run in at least 1 part.")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay={ema_decay}; it must be above 0 and below 1, or None.")
    gradient_of = jax.value_and_grad(
        partial(loss, program(config, attention=attention)), has_aux=True
    )

    def compute_gradient(params, batch):
        cache = _row_cache(config, batch)
        total_weight = jnp.sum(batch.weights)
        part_gradient = lambda part: gradient_of(params, cache, part, z_loss, total_weight)
        if accumulate == 1:
            return part_gradient(batch)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, part_gradient(part)), None

        parts = jax.tree.map(partial(_split_rows, accumulate), batch)
        one = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part_gradient, one))
        return jax.lax.scan(add, zeros, parts)[0]

    def update(state, gradient):
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if ema_decay is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), state.ema, params)
        return TrainState(state.step + 1, params, optimizer_state, ema)

    def train_step(state, batch):
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(
                f"ema_decay={ema_decay} with a state that has "
                f"{'no' if state.ema is None else 'an'} average; init_state takes the same one."
            )
        (objective, nll), gradient = compute_gradient(state.params, batch)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(objective) & jnp.isfinite(norm)
        # A branch, not a select: where the update is in place, XLA would copy the state for one.
        state = jax.lax.cond(finite, update, lambda state, _: state, state, gradient)
        return state, {"loss": nll, "gradient_norm": norm, "finite": finite}

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _row_cache(config, batch):
    """An empty cache for one row of a batch."""
    length = batch.tokens.shape[1]
    if length > config.max_length:
        raise ValueError(f"rows of {length} tokens exceed the model's {config.max_length=}.")
    return init_cache(config, length)


def _split_rows(parts, x):
    """[B, T] -> [parts, B / parts, T], each part taking every `parts`-th row.

    So a batch whose rows are sharded over devices is split without moving rows between them.
    """
    if len(x) % parts:
        raise ValueError(
            f"a batch of {len(x)} rows cannot be run in accumulate={parts} equal parts; "
            f"use a batch size that is a multiple of {parts}."
        )
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def make_eval_step(config: Config, attention: str = "auto") -> Callable[[Params, Batch], jax.Array]:
    """Makes a compiled `eval_step(params, batch) -> nll [B, T]` in nats, weights not applied.

    Raises:
      ValueError: while tracing, T exceeds config.max_length.
    """
    f = program(config, attention=attention)

    @jax.jit
    def eval_step(params, batch):
        cache = _row_cache(config, batch)
        return cross_entropy(compute_logits(f, params, cache, batch), batch.targets)[0]

    return eval_step


def evaluate(
    eval_step: Callable, params, batches: Iterable[Batch], byte_lengths: np.ndarray
) -> dict[str, float]:
    """Loss over batches, per target and per byte of text.

    Args:
      eval_step: (params, batch) -> nll [B, T] in nats.
      params: what to evaluate.
      batches: each target of the text once; padding has weight 0.
      byte_lengths: [V] bytes that each token stands for. The end of a document stands for 0 bytes,
        and its nats count.

    Returns:
      validation_loss, nats per target; validation_bits_per_byte.

    Raises:
      ValueError: no target in batches stands for any text.
    """
    nats = targets = size = 0.0
    for batch in batches:
        weights = np.asarray(batch.weights, np.float64)
        nats += float(np.sum(np.asarray(eval_step(params, batch), np.float64) * weights))
        targets += float(np.sum(weights))
        size += float(np.sum(np.asarray(byte_lengths)[np.asarray(batch.targets)] * weights))
    if not size:
        raise ValueError("no target to evaluate stands for any text; give at least one batch.")
    return {
        "validation_loss": nats / targets,
        "validation_bits_per_byte": nats / math.log(2) / size,
    }
