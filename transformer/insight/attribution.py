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
      Of each block a pytree like `trace.cells[b]`, with a leading axis T.

    Raises:
      ValueError: `of` is something else.
    """
    still = jax.tree.map(jnp.zeros_like, _values(trace(f, params, cache, tokens), of))

    def number(moved):
        plus = lambda x, more: jax.tree.map(jnp.add, x, more)
        pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
        edits = [
            Change(block, of, None, lambda x, i, more=more: plus(x, pick(more, i)))
            for block, more in enumerate(moved)
        ]
        return objective(run(intervene(f, edits), params, cache, tokens)[1])

    return jax.jit(jax.grad(number))(still)


def attribution(f: Callable, params, cache: Cache, tokens, objective: Callable, *, of="cell"):
    """Gradient times activation: to first order, what erasing each cell would take from a number.

    Args:
      f, params, cache, tokens, objective, of: as in `gradients`.

    Returns:
      [blocks, T].
    """
    values = _values(trace(f, params, cache, tokens), of)
    slopes = gradients(f, params, cache, tokens, objective, of=of)
    return jnp.stack([_dot(*pair) for pair in zip(slopes, values, strict=True)])


def contributions(seen: Trace, block: int, position: int, toward):
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

    Returns:
      [S], of the cells from position 0 to the last token's. Of cells that were in the cache before
      the trace, those of attention are known; the others are 0.

    Raises:
      ValueError: there is no such block or token.
    """
    reading, position = seen.reading(block), token_index(position, len(seen.tokens))
    if isinstance(reading.memory, Softmax | Latent):
        near, of, weights = attention(reading, seen.positions, jnp.asarray([position]))
        along = jnp.einsum("snh,nh->sn", of.v, toward, precision="highest")
        return by_position(near, jnp.einsum("ns,sn->s", weights[0], along), seen.length)
    z = lambda cells: jax.tree.map(lambda x: x[position], again(reading, seen.positions, cells))
    [slope] = jax.vjp(z, reading.cells)[1](toward)
    return jnp.concatenate([jnp.zeros(seen.start), _dot(slope, reading.cells)])


def again(reading: Reading, positions, cells):
    """What the tokens of a trace would have read, had these cells been written."""
    return reading.memory.chunk(reading.before, positions, cells, reading.queries, reading.shared)[
        1
    ]


def _values(seen, of):
    values = {"cell": seen.cells, "query": seen.queries, "read": seen.reads}
    if of not in values:
        raise ValueError(f"of={of!r}; choose one of {', '.join(values)}.")
    return values[of]


def _dot(a, b):
    """The product of two pytrees [T, ...], summed within each token: [T]."""
    product = lambda x, y: jnp.sum(x * y, axis=tuple(range(1, x.ndim)))
    return sum(jax.tree.leaves(jax.tree.map(product, a, b)))
