"""Mixture of experts: every token runs through the experts its router chose, and no others.

Tokens are sorted by expert and each expert multiplies its own run of rows (`kernels.ragged_dot`),
so expert weights are never gathered per token and none is dropped for lack of room. Of several
devices, each sorts the tokens that it holds, and adds up what its own experts make of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from kernels.tracing import primitive
from transformer.axes import split_over
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
    weights, tree = jax.tree.flatten(params.replace(shared=None, shared_gate=None))
    [y] = experts_p.bind(x[None], *weights, spec=spec, tree=tree)
    if params.shared is None:
        return y[0]
    return spec.numerics.narrowed(y[0] + _run_shared(spec, params, x))


def route(spec, params: Experts, x):
    """Which experts a token takes, and their gates: x [E] -> gates [k], experts [k]."""
    config = spec.config
    logits = linear(spec, params.router, x).astype(jnp.promote_types(x.dtype, jnp.float32))
    scores = choice = _scores(spec, logits)
    if params.choice_bias is not None:
        choice = scores + params.choice_bias
    if config.expert_groups is not None:
        choice = _of_best_groups(spec, choice)
    chosen = jax.lax.top_k(choice, config.experts_per_token)[1]
    gates = scores[chosen]
    if config.expert_gates == "chosen":
        gates = spec.numerics.softmax(gates)
    elif config.expert_gates == "sigmoid":
        gates = gates / (spec.numerics.sum(gates) + 1e-20)
    return spec.numerics.rounded(gates * config.expert_scale), chosen


def _scores(spec, logits):
    """By what experts are chosen, and what their gates are made of: [X] -> [X]."""
    kind = spec.config.expert_gates
    if kind == "chosen":
        return logits
    return spec.numerics.softmax(logits) if kind == "all" else spec.numerics.sigmoid(logits)


def _of_best_groups(spec, scores):
    """Scores [X] of which those outside of the best groups are -inf.

    A group is as good as its best expert, or, by sigmoids, as its two best together (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2).
    """
    config = spec.config
    groups, kept = config.expert_groups
    by_group = scores.reshape(groups, -1)
    best = min(2 if config.sigmoid_gates else 1, by_group.shape[1])
    worth = spec.numerics.sum(jax.lax.top_k(by_group, best)[0])[:, 0]
    chosen = (jax.lax.top_k(worth, kept)[1][:, None] == jnp.arange(groups)).any(0)
    return jnp.where(chosen[:, None], by_group, -jnp.inf).reshape(-1)


def _run_shared(spec, params, x):
    y = dense(spec, params.shared, x)
    if params.shared_gate is None:
        return y
    gate = spec.numerics.sigmoid(linear(spec, params.shared_gate, x))
    return spec.numerics.rounded(y * gate)


def _run(x, *weights, spec, tree):
    """x [M, E] -> [[M, E]]."""
    params = jax.tree.unflatten(tree, weights)
    tokens = split_over(len(x), "rows", "tokens")
    devices = split_over(spec.config.num_experts, "experts")
    if not tokens + devices:
        return [_mix(spec, params, x, 0)]

    def part(params, x):
        first = jax.lax.axis_index(devices) * len(params.up.weight) if devices else 0
        return jax.lax.psum(_mix(spec, params, x, first), devices)

    at = jax.tree.map(lambda _: PartitionSpec(devices), params)
    whole = jax.tree.map(lambda _: PartitionSpec(), (params.router, params.choice_bias))
    at = at.replace(router=whole[0], choice_bias=whole[1])
    by_token = PartitionSpec(tokens)
    # Where it checks what varies, JAX adds the gradients of `ragged_dot`'s rows up too early.
    part = jax.shard_map(
        part,
        in_specs=(at, by_token),
        out_specs=by_token,
        axis_names={*tokens, *devices},
        check_vma=False,
    )
    return [part(params, x)]


def _mix(spec, params, x, first):
    """The part of the sum that the experts `first`.. make, which are here: x [M, E] -> [M, E]."""
    gates, chosen = jax.vmap(partial(route, spec, params))(x)
    chosen = chosen - first
    k, X = chosen.shape[1], len(params.up.weight)
    here = (chosen >= 0) & (chosen < X)
    chosen = jnp.where(here, chosen, X)  # those elsewhere come last, behind the rows of all groups
    order = jnp.argsort(chosen.reshape(-1))
    expert = chosen.reshape(-1)[order]
    sizes = (expert[:, None] == jnp.arange(X)).sum(0, dtype=jnp.int32)

    numerics = spec.numerics

    def linear(params, rows):
        y = numerics.ragged_dot(rows, params.weight, sizes)
        if params.bias is None:
            return y
        return numerics.narrowed(y + numerics.cast(params.bias, x.dtype)[expert])

    rows = x[order // k]
    gate = None if params.gate is None else linear(params.gate, rows)
    hidden = activate(spec, linear(params.up, rows), gate)
    rows = linear(params.down, hidden)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return numerics.mixture(gates.astype(x.dtype), jnp.where(here[..., None], rows, 0))


def _batch(axis, operands, dims, **static):
    """Mapped tokens become rows."""
    if all(dim is None for dim in dims):
        return experts_p.bind(*operands, **static), [None]
    if any(dim is not None for dim in dims[1:]):
        raise NotImplementedError(
            "the weights of experts cannot be mapped; use jax.lax.map over models, not jax.vmap."
        )

    def fold(x, dim):
        x = jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return x.reshape(-1, *x.shape[2:])

    [y] = experts_p.bind(fold(operands[0], dims[0]), *operands[1:], **static)
    return [y.reshape(axis.size, -1, y.shape[-1])], [0]


experts_p = primitive.define("experts", _run, _batch)
