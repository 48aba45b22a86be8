"""Mixture of experts: every token runs through the experts its router chose, and no others.

Tokens are sorted by expert and each expert multiplies its own run of rows (`jax.lax.ragged_dot`),
so expert weights are never gathered per token and none is dropped for lack of room.
"""

import jax
import jax.numpy as jnp
from flax import struct

from kernels.tracing import primitive
from transformer.program.activation import activate
from transformer.program.dense import FeedForward, dense
from transformer.program.linear import Linear, linear


@struct.dataclass
class Experts:
    """router [E, X]; up, gate [X, E, F]; down [X, F, E]. gate is None in the ungated form.

    choice_bias [X] takes part in the choice of experts, and not in their gates. shared is an expert
    that all tokens run through, shared_gate [E, 1] what it is weighted by.
    """

    router: Linear
    up: Linear
    down: Linear
    gate: Linear | None = None
    choice_bias: jax.Array | None = None
    shared: FeedForward | None = None
    shared_gate: Linear | None = None


def mix_experts(spec, params: Experts, x):
    """x [E] -> [E]: the sum of k experts, weighted by their gates (arXiv:2401.04088)."""
    gates, chosen = route(spec, params, x)
    own = params.replace(router=None, choice_bias=None, shared=None, shared_gate=None)
    weights, tree = jax.tree.flatten(own)
    [y] = experts_p.bind(
        x[None],
        gates.astype(x.dtype)[None],
        chosen[None],
        *(w.astype(x.dtype) for w in weights),
        spec=spec,
        tree=tree,
    )
    return (
        y[0]
        if params.shared is None
        else spec.numerics.rounded(y[0] + _run_shared(spec, params, x))
    )


def route(spec, params: Experts, x):
    """Which experts a token takes, and their gates: x [E] -> gates [k], experts [k]."""
    config = spec.config
    logits = linear(spec, params.router, x).astype(jnp.promote_types(x.dtype, jnp.float32))
    scores = {"all": spec.numerics.softmax, "sigmoid": jax.nn.sigmoid}.get(
        config.expert_gates, lambda x: x
    )
    scores = choice = scores(logits)
    if params.choice_bias is not None:
        choice = scores + params.choice_bias
    if config.expert_groups is not None:
        choice = _of_best_groups(config, choice)
    chosen = jax.lax.top_k(choice, config.experts_per_token)[1]
    gates = scores[chosen]
    if config.expert_gates == "chosen":
        gates = spec.numerics.softmax(gates)
    elif config.expert_gates == "sigmoid":
        gates = gates / (spec.numerics.sum(gates) + 1e-20)
    return spec.numerics.rounded(gates * config.expert_scale), chosen


def _of_best_groups(config, scores):
    """Scores [X] of which those outside of the best groups are -inf.

    A group is as good as its best expert, or, by sigmoids, as its two best together (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2).
    """
    groups, kept = config.expert_groups
    by_group = scores.reshape(groups, -1)
    best = min(2 if config.expert_gates == "sigmoid" else 1, by_group.shape[1])
    worth = jax.lax.top_k(by_group, best)[0].sum(-1)
    chosen = (jax.lax.top_k(worth, kept)[1][:, None] == jnp.arange(groups)).any(0)
    return jnp.where(chosen[:, None], by_group, -jnp.inf).reshape(-1)


def _run_shared(spec, params, x):
    y = dense(spec, params.shared, x)
    if params.shared_gate is None:
        return y
    return spec.numerics.rounded(y * jax.nn.sigmoid(linear(spec, params.shared_gate, x)))


def _run(x, gates, chosen, *weights, spec, tree):
    """x [M, E], gates and chosen [M, k] -> [[M, E]]."""
    experts, k = jax.tree.unflatten(tree, weights), chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1))
    expert = chosen.reshape(-1)[order]
    sizes = (expert[:, None] == jnp.arange(spec.config.num_experts)).sum(0, dtype=jnp.int32)

    def linear(params, rows):
        y = spec.numerics.ragged_dot(rows, params.weight, sizes)
        return y if params.bias is None else spec.numerics.rounded(y + params.bias[expert])

    rows = x[order // k]
    gate = None if experts.gate is None else linear(experts.gate, rows)
    hidden = activate(spec, linear(experts.up, rows), gate)
    rows = linear(experts.down, hidden)[jnp.argsort(order)]
    return [spec.numerics.mixture(gates, rows.reshape(*chosen.shape, -1))]


def _batch(axis, operands, dims, **static):
    """Mapped tokens become rows."""
    if all(dim is None for dim in dims):
        return experts_p.bind(*operands, **static), [None]
    if any(dim is not None for dim in dims[3:]):
        raise NotImplementedError(
            "the weights of experts cannot be mapped; use jax.lax.map over models, not jax.vmap."
        )

    def fold(x, dim):
        x = jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return x.reshape(-1, *x.shape[2:])

    folded = [fold(x, dim) for x, dim in zip(operands[:3], dims[:3], strict=True)]
    [y] = experts_p.bind(*folded, *operands[3:], **static)
    return [y.reshape(axis.size, -1, y.shape[-1])], [0]


experts_p = primitive.define("experts", _run, _batch)
