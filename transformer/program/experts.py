"""Mixture of experts: every token runs through the experts its router chose, and no others.

Tokens are sorted by expert and each expert multiplies its own run of rows (`jax.lax.ragged_dot`),
so expert weights are never gathered per token and none is dropped for lack of room.
"""

import jax
import jax.numpy as jnp
from flax import struct

from kernels.tracing import primitive
from transformer.program.activation import activate
from transformer.program.linear import Linear, linear


@struct.dataclass
class Experts:
    """router [E, X]; up, gate [X, E, F]; down [X, F, E]. gate is None in the ungated form."""

    router: Linear
    up: Linear
    down: Linear
    gate: Linear | None = None


def mix_experts(spec, params: Experts, x):
    """Top-k routing (arXiv:2401.04088): x [E] -> [E], a sum of k experts weighted by their gates.

    The gates are a softmax over the logits of the chosen experts, or over those of all.
    """
    config = spec.config
    logits = linear(spec, params.router, x).astype(jnp.promote_types(x.dtype, jnp.float32))
    if config.expert_gates == "all":
        gates, chosen = jax.lax.top_k(jax.nn.softmax(logits), config.experts_per_token)
    else:
        logits, chosen = jax.lax.top_k(logits, config.experts_per_token)
        gates = jax.nn.softmax(logits)
    weights, tree = jax.tree.flatten(params.replace(router=None))
    [y] = experts_p.bind(
        x[None],
        gates.astype(x.dtype)[None],
        chosen[None],
        *(w.astype(x.dtype) for w in weights),
        spec=spec,
        tree=tree,
    )
    return y[0]


def _run(x, gates, chosen, *weights, spec, tree):
    """x [M, E], gates and chosen [M, k] -> [[M, E]]."""
    experts, k = jax.tree.unflatten(tree, weights), chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1))
    expert = chosen.reshape(-1)[order]
    sizes = (expert[:, None] == jnp.arange(spec.config.num_experts)).sum(0, dtype=jnp.int32)

    def linear(params, rows):
        y = jax.lax.ragged_dot(rows, params.weight, sizes)
        return y if params.bias is None else y + params.bias[expert]

    rows = x[order // k]
    gate = None if experts.gate is None else linear(experts.gate, rows)
    hidden = activate(spec, linear(experts.up, rows), gate)
    rows = linear(experts.down, hidden)[jnp.argsort(order)]
    return [jnp.einsum("mk,mke->me", gates, rows.reshape(*chosen.shape, -1))]


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
