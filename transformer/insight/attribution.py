"""How much a number depends on each cell: gradient times activation, in a model and in one read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from transformer.insight.edits import Change
from transformer.insight.intervene import intervene
from transformer.insight.positions import token_index
from transformer.insight.trace import Reading, Trace, attention, by_position, trace
from transformer.memory.cache import Cache
from transformer.memory.latent import Latent
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import run


def gradients(f: Callable, params, cache: Cache, tokens, objective: Callable, *, of: str = "cell"):
    """The gradient of a number by all that was written, asked or read.

    Args:
      f, params, tokens: as in `trace`; the tokens begin at position 0.
      cache: an empty one.
      objective: objective(logits [T, V]) -> the number.
      of: "cell", "query" or "read".

    Returns:
      Of each block a pytree like `trace.cells[b]`, with a leading axis T. Of queries and reads one
      for each of `trace.instructions`: a block that is read again has several.

    Raises:
      ValueError: `of` is something else.
    """
    seen = trace(f, params, cache, tokens)
    still = jax.tree.map(jnp.zeros_like, _values(seen, of))
    places = [
        (x.block, None if of == "cell" else x.read)
        for x in (seen.written if of == "cell" else seen.instructions)
    ]

    def number(moved):
        plus = lambda x, more: jax.tree.map(jnp.add, x, more)
        pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
        edits = [
            Change(block, of, None, lambda x, i, more=more: plus(x, pick(more, i)), read)
            for (block, read), more in zip(places, moved, strict=True)
            if jax.tree.leaves(more)  # else there is nothing, such as a query of a convolution
        ]
        return objective(run(intervene(f, edits), params, cache, tokens)[1])

    return jax.jit(jax.grad(number, allow_int=True))(still)


def attribution(f: Callable, params, cache: Cache, tokens, objective: Callable, *, of="cell"):
    """Gradient times activation: to first order, what erasing each cell would take from a number.

    Args:
      f, params, cache, tokens, objective, of: as in `gradients`.

    Returns:
      [blocks, T]; of queries and reads [instructions, T], as in `gradients`.
    """
    values = _values(trace(f, params, cache, tokens), of)
    slopes = gradients(f, params, cache, tokens, objective, of=of)
    length = len(tokens)
    return jnp.stack([_dot(*pair, length) for pair in zip(slopes, values, strict=True)])


def contributions(seen: Trace, block: int, position: int, toward, *, read: int = 0):
    """How much of what a token read came from each cell, measured along a direction.

    In attention, with the softmax frozen: the weight of a cell times its value. In any other
    memory: the derivative of the read by the cell, through all that the state went through since,
    times the cell. The sum is the whole of what was read where the read is linear in the cells.

    Args:
      seen: a trace.
      block: the number of the block.
      position: which token of the trace read, as an index into T.
      toward: a pytree like `seen.reads[block]` of one token, such as the gradient of a number by
        it (`gradients(..., of="read")`).
      read: which read of the block, as in `Trace.weights`.

    Returns:
      [S], of the cells from position 0 to the last token's. Of cells that were in the cache before
      the trace, those of attention are known; the others are 0.

    Raises:
      ValueError: there is no such block, token or read.
    """
    reading, position = seen.reading(block, read), token_index(position, len(seen.tokens))
    if isinstance(reading.memory, Softmax | Latent):
        near, of, weights = attention(reading, seen.positions, jnp.asarray([position]))
        along = jnp.einsum("snh,nh->sn", of.v, toward, precision="highest")
        return by_position(near, jnp.einsum("ns,sn->s", weights[0], along), seen.length)
    z = lambda cells: jax.tree.map(lambda x: x[position], again(reading, seen.positions, cells))
    [slope] = jax.vjp(z, reading.cells)[1](toward)
    own = _dot(slope, reading.cells, len(seen.tokens))
    return jnp.concatenate([jnp.zeros(seen.start), own])


def again(reading: Reading, positions, cells):
    """What the tokens of a trace would have read, had these cells been written."""
    return reading.memory.chunk(reading.before, positions, cells, reading.queries, reading.shared)[
        1
    ]


def _values(seen, of):
    values = {
        "cell": seen.cells,
        "query": tuple(x.queries for x in seen.instructions),
        "read": tuple(x.z for x in seen.instructions),
    }
    if of not in values:
        raise ValueError(f"of={of!r}; choose one of {', '.join(values)}.")
    return values[of]


def _dot(slopes, values, length):
    """The product of two pytrees [T, ...], summed within each token: [T]; whole numbers add 0."""
    pairs = zip(*map(jax.tree.leaves, (slopes, values)), strict=True)
    real = [(slope, x) for slope, x in pairs if jnp.issubdtype(x.dtype, jnp.inexact)]
    parts = [jnp.sum(slope * x, axis=tuple(range(1, x.ndim))) for slope, x in real]
    return sum(parts, jnp.zeros(length))
