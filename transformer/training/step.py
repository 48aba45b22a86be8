"""The training step: it follows the gradient of the loss in the parallel mode."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct

from transformer.config import Config
from transformer.data.batches import Batch
from transformer.program.init import init_params
from transformer.program.params import Params
from transformer.program.program import program
from transformer.training.lora import Adapters, merged
from transformer.training.loss import loss, row_cache


@struct.dataclass
class TrainState:
    """All that a training step changes.

    step: int32, how many steps have been taken.
    params, optimizer_state: what is trained, parameters or adapters, and what the optimizer
      remembers of their gradients.
    ema: exponential moving average of what is trained; None where it is not kept.
    base: the parameters that adapters are added to; None where there are no adapters.
    """

    step: jax.Array
    params: Params | Adapters
    optimizer_state: optax.OptState
    ema: Params | Adapters | None = None
    base: Params | None = None


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    ema_decay: float | None = None,
    prepared: Callable[[Params], Params] = lambda params: params,
) -> TrainState:
    """The state before the first step; the average starts at the initial parameters.

    `prepared` changes fresh parameters, as `optimizer.transferred` does.
    """

    @jax.jit  # one program, where every parameter by itself would be several
    def init(key):
        return first_state(prepared(init_params(config, key)), optimizer, ema_decay)

    return init(key)


def first_state(
    params: Params | Adapters,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None = None,
) -> TrainState:
    """The state before the first step of parameters, or adapters, that are there."""
    ema = None if ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema)


def make_train_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    *,
    numerics: str = "fast",
    attention: str = "auto",
    f: Callable | None = None,
    accumulate: int = 1,
    loss_parts: int = 1,
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
      numerics, attention: as in `program`.
      f: what is trained in the place of `program(config, ...)`: a program for the same parameters
        and cache, such as `intervene` makes; None: the config's own.
      accumulate: parts that a batch is run in, one after another; it divides B. The gradient is
        that of the whole batch.
      loss_parts: parts of each row whose logits are made one after another, so that they are never
        there all at once; it divides T.
      z_loss: as in `loss`.
      ema_decay: of the state's moving average, in (0, 1); None: the state has none.
      state_shardings: where the new state lies on a mesh of several devices, as
        `devices.layout.state_shardings` says; what is compiled must then be traced within
        `jax.set_mesh(mesh)`.

    Raises:
      ValueError: accumulate, loss_parts or ema_decay out of range; while tracing, B is no multiple
        of accumulate or T of loss_parts, T exceeds config.max_length, or the state's average does
        not go with ema_decay.
    """
    if loss_parts < 1:
        raise ValueError(f"loss_parts={loss_parts}; logits are made in at least 1 part.")
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}; a batch is run in at least 1 part.")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay={ema_decay}; it must be above 0 and below 1, or None.")
    f = program(config, numerics=numerics, attention=attention) if f is None else f

    def compute_gradient(params, base, batch):
        cache = row_cache(config, batch)
        total_weight = jnp.sum(batch.weights)
        objective = lambda params, part: loss(
            f, merged(base, params), cache, part, z_loss, total_weight, loss_parts
        )
        part_gradient = partial(jax.value_and_grad(objective, has_aux=True), params)
        if accumulate == 1:
            return part_gradient(batch)

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, part_gradient(part)), None

        parts = jax.tree.map(partial(_split_rows, accumulate), batch)
        one = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part_gradient, one))
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state, batch):
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(
                f"ema_decay={ema_decay} with a state that has "
                f"{'no' if state.ema is None else 'an'} average; init_state takes the same one."
            )
        base, state = state.base, state.replace(base=None)
        (objective, nll), gradient = compute_gradient(state.params, base, batch)
        state, moved = follow(optimizer, state, objective, gradient, ema_decay)
        return state.replace(base=base), {"loss": nll, **moved}

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def follow(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    objective: jax.Array,
    gradient: Params,
    ema_decay: float | None = None,
) -> tuple[TrainState, dict]:
    """Moves a state along the gradient of an objective, unless one of the two is not finite.

    Returns:
      The state after the step, or as it was; and the metrics `gradient_norm`, before clipping, and
      `finite`.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(objective) & jnp.isfinite(norm)

    def update(state, gradient):
        updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
            gradient, state.optimizer_state, state.params, norm=norm
        )
        params = optax.apply_updates(state.params, updates)
        ema = None
        if ema_decay is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), state.ema, params)
        return TrainState(state.step + 1, params, optimizer_state, ema)

    # A branch, not a select: where the update is in place, XLA would copy the state for one.
    state = jax.lax.cond(finite, update, lambda state, _: state, state, gradient)
    return state, {"gradient_norm": norm, "finite": finite}


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
