"""Patching over pairs of prompts: which cells, and which paths, carry the difference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.insight.attribution import again
from transformer.insight.edits import patch, replace
from transformer.insight.intervene import intervene
from transformer.insight.trace import trace
from transformer.memory.cache import Cache
from transformer.modes.schedule import run


def activation_patching(f: Callable, params, cache: Cache, clean, corrupt, metric: Callable):
    """Runs a prompt once for each cell, that cell written as another prompt of T tokens writes it.

    Args:
      f, params: the program.
      cache: an empty one.
      clean: [T] int, the prompt that cells are taken from.
      corrupt: [T] int, the prompt that runs.
      metric: metric(logits [T, V]) -> a number.

    Returns:
      [blocks, T], the number with each cell patched.

    Raises:
      ValueError: the prompts differ in length.
    """
    _require_alike(clean, corrupt)
    source = trace(f, params, cache, clean)
    blocks, length = len(source.cells), len(source.tokens)

    def one(where):
        # Which cell it is, is a number, so that one program runs for all; no token is at `length`.
        block, s = where
        edits = [
            patch(b, jnp.where(b == block, s, length)[None], jax.tree.map(lambda x: x[s][None], x))
            for b, x in enumerate(source.cells)
        ]
        return metric(run(intervene(f, edits), params, cache, corrupt)[1])

    every = [x.ravel() for x in jnp.indices((blocks, length), dtype=jnp.int32)]
    return jax.lax.map(one, every).reshape(blocks, length)


def path_patching(
    f: Callable,
    params,
    cache: Cache,
    clean,
    corrupt,
    metric: Callable,
    block: int,
    *,
    read: int = 0,
):
    """Runs a prompt once for each edge of a block: one token reads one cell of another prompt.

    All other tokens read that cell as it is, so that only the path through this read differs.

    Args:
      f, params, cache, clean, corrupt, metric: as in `activation_patching`.
      block: the number of the block.
      read: which read of the block, as in `Trace.weights`.

    Returns:
      [T, T], the number for each token that reads, and each cell; no cell lies after the token.

    Raises:
      ValueError: the prompts differ in length, or there is no such block or read.
    """
    _require_alike(clean, corrupt)
    source, base = (trace(f, params, cache, tokens) for tokens in (clean, corrupt))
    reading, length = base.reading(block, read), len(base.tokens)
    plain = metric(base.logits)

    def one(edge):
        t, s = edge
        put = lambda x, new: x.at[s].set(new[s])
        cells = jax.tree.map(put, reading.cells, source.reading(block).cells)
        z = jax.tree.map(lambda x: x[t], again(reading, base.positions, cells))
        g = intervene(f, [replace(block, t[None], z, of="read", read=read)])
        return metric(run(g, params, cache, corrupt)[1])

    edges = jnp.stack(jnp.tril_indices(length), 1)
    values = jax.lax.map(lambda edge: one((edge[0], edge[1])), edges)
    return jnp.full((length, length), plain).at[edges[:, 0], edges[:, 1]].set(values)


def _require_alike(clean, corrupt):
    if len(clean) != len(corrupt):
        raise ValueError(
            f"the prompts have {len(clean)} and {len(corrupt)} tokens; cells are exchanged "
            "position by position, so both must have as many."
        )
