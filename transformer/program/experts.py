"""Mixture of experts: every token runs through the experts its router chose, and no others.

Tokens are sorted by expert and each expert multiplies its own run of rows (`jax.lax.ragged_dot`),
so expert weights are never gathered per token and none is dropped for lack of room.
"""

import jax
import jax.numpy as jnp
from flax import struct

from kernels.tracing import primitive
from transformer.program.activation import activate


@struct.dataclass
class Experts:
    """router [E, X]; up, gate [X, E, F]; down [X, F, E]. gate is None in the ungated form."""

    router: jax.Array
    up: jax.Array
    down: jax.Array
    gate: jax.Array | None = None


def mix_experts(config, params: Experts, x):
    """Top-k routing (arXiv:2401.04088): x [E] -> [E], a mean of k experts weighted by their gates.

    The gates are the softmax over the logits of the chosen experts.
    """
    logits = (x @ params.router.astype(x.dtype)).astype(jnp.float32)
    logits, chosen = jax.lax.top_k(logits, config.experts_per_token)
    gates = jax.nn.softmax(logits).astype(x.dtype)
    weights = [w for w in (params.up, params.down, params.gate) if w is not None]
    [y] = experts_p.bind(
        x[None],
        gates[None],
        chosen[None],
        *(w.astype(x.dtype) for w in weights),
        config=config,
    )
    return y[0]


def _run(x, gates, chosen, up, down, gate=None, *, config):
    """x [M, E], gates and chosen [M, k] -> [[M, E]]."""
    k = chosen.shape[1]
    order = jnp.argsort(chosen.reshape(-1))
    sizes = (chosen.reshape(-1, 1) == jnp.arange(up.shape[0])).sum(0, dtype=jnp.int32)
    rows = x[order // k]
    hidden = jax.lax.ragged_dot(rows, up, sizes)
    gate = None if gate is None else jax.lax.ragged_dot(rows, gate, sizes)
    hidden = activate(config, hidden, gate)
    rows = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)]
    return [jnp.einsum("mk,mke->me", gates, rows.reshape(*chosen.shape, -1))]


def _batch(axis, operands, dims, *, config):
    """Mapped tokens become rows."""
    if all(dim is None for dim in dims):
        return experts_p.bind(*operands, config=config), [None]
    if any(dim is not None for dim in dims[3:]):
        raise NotImplementedError(
            "the weights of experts cannot be mapped; use jax.lax.map over models, not jax.vmap."
        )

    def fold(x, dim):
        x = jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        return x.reshape(-1, *x.shape[2:])

    folded = [fold(x, dim) for x, dim in zip(operands[:3], dims[:3], strict=True)]
    [y] = experts_p.bind(*folded, *operands[3:], config=config)
    return [y.reshape(axis.size, -1, y.shape[-1])], [0]


experts_p = primitive.define("experts", _run, _batch)
