"""The weights of attention, by the formula: how much of which cell a query reads.

The fused kernels never hold them. Here they are made for as many queries as are asked for, and what
is read with some of the cells hidden is made from them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.memory.latent import Latent
from transformer.memory.memory import Memory
from transformer.memory.softmax import Softmax


class Heads(NamedTuple):
    """Attention as plain heads: q [T, N, H], k [S, N, H], v [S, N, Hv]; sinks [N] or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None


def heads(memory: Memory, queries, cells, shared) -> Heads:
    """Queries and cells of `Softmax` or `Latent` as plain heads, in float32 at least.

    Args:
      memory: what the block is written and read by.
      queries, cells: pytrees with leading axes T and S.
      shared: as the memory takes it.
    """
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if isinstance(memory, Latent):
        (q, q_position), (key, value) = jax.tree.map(wide, (queries, shared))
        latent, position = jnp.split(wide(cells), [memory.rank], axis=1)
        make = lambda x: jnp.einsum("sr,rnh->snh", latent, x, precision="highest")
        position = jnp.broadcast_to(
            position[:, None], (len(position), q.shape[1], *position.shape[1:])
        )
        k = jnp.concatenate([make(key), position], -1)
        return Heads(jnp.concatenate([q, q_position], -1), k, make(value), None)
    q = wide(queries)
    spread = lambda x: wide(x).repeat(q.shape[1] // x.shape[1], axis=1)
    return Heads(q, *map(spread, cells), None if shared is None else wide(shared))


def weights(memory: Memory, of: Heads, distance, visible):
    """The weights of attention: [T, N, S]; those of a query that sees nothing are zeros.

    Args:
      memory: `Softmax` or `Latent`.
      of: its heads.
      distance: [T, S] int32, how far back each cell lies.
      visible: [T, S] or [T, N, S] bool, what each query sees.
    """
    scale = of.q.shape[-1] ** -0.5 if memory.scale is None else memory.scale
    scores = jnp.einsum("tnh,snh->tns", of.q, of.k, precision="highest") * scale
    if memory.soft_cap is not None:
        scores = memory.soft_cap * jnp.tanh(scores / memory.soft_cap)
    if isinstance(memory, Softmax) and memory.slopes is not None:
        slopes = jnp.asarray(memory.slopes, scores.dtype)[:, None]
        scores -= slopes * distance[:, None].astype(scores.dtype)
    visible = jnp.broadcast_to(visible if visible.ndim == 3 else visible[:, None], scores.shape)
    some = visible.any(-1, keepdims=True)
    # A row without a visible cell takes all of them instead, since a softmax of nothing is nan.
    scores = jnp.where(visible | ~some, scores, -jnp.inf)
    if of.sinks is not None:
        sinks = jnp.broadcast_to(of.sinks[:, None], (*scores.shape[:2], 1))
        scores = jnp.concatenate([scores, sinks], -1)
    return jnp.where(some, jax.nn.softmax(scores)[..., : visible.shape[-1]], 0)
