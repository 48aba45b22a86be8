"""How predictions came about: through which cells, read by whom, and what cutting does."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer.insight.attribution import contributions, gradients
from transformer.insight.cutting import STATES
from transformer.insight.edits import cut
from transformer.insight.intervene import intervene
from transformer.insight.lens import lens
from transformer.insight.residual import block_layers
from transformer.insight.trace import trace
from transformer.memory.cache import Cache
from transformer.modes.schedule import run
from transformer.program.params import Params

AT_ONCE = 8  # runs with a cell cut off, since parameters are read once for all


@struct.dataclass
class Flow:
    """The flow of information through a prompt of T tokens.

    Attributes:
      tokens: [T] int32.
      predicted: [T] int32, the most likely token after each.
      probability: [T], that of the predicted one.
      edges: [T, blocks, T, T]: how much the log-probability of each prediction owes to each
        read (by a token, of a cell) of each block: the gradient by the read, times what came from
        that cell (`contributions`).
      lens, lens_probability: [L, T], what the residual stream after each layer says comes next.
      cut_predicted, cut_probability: [blocks, T, T]: with one cell (block, position) cut off from
        all queries, the prediction after each token, and its probability.
      layers: of each block the number of the layer that writes it.
      states: the blocks that are states; their single reads cannot be cut (`without_reads`).
    """

    tokens: jax.Array
    predicted: jax.Array
    probability: jax.Array
    edges: jax.Array
    lens: jax.Array
    lens_probability: jax.Array
    cut_predicted: jax.Array
    cut_probability: jax.Array
    layers: tuple[int, ...] = struct.field(pytree_node=False)
    states: tuple[int, ...] = struct.field(pytree_node=False)


def flow(f: Callable, params: Params, cache: Cache, tokens) -> Flow:
    """Finds how a prompt's predictions came about; meant for prompts of a few dozen tokens.

    Args:
      f: a program made by `program`.
      params: its parameters.
      cache: an empty one.
      tokens: [T] int.

    Raises:
      ValueError: a block's cells cannot be cut, as those of some memories of one's own.
    """
    return _flow(f, params, cache, jnp.asarray(tokens))


def edges(f: Callable, params, cache: Cache, tokens, objective: Callable):
    """What a number owes to each read of each cell: [blocks, T, T], by block, reader and cell.

    Where a block is read again, the sum over its reads.
    """
    seen = trace(f, params, cache, tokens)
    slopes = gradients(f, params, cache, tokens, objective, of="read")
    readers = jnp.arange(len(seen.tokens))

    def of_read(x, slopes):
        slope = lambda t: jax.tree.map(lambda slope: slope[t], slopes)
        return jax.vmap(lambda t: contributions(seen, x.block, t, slope(t), read=x.read))(readers)

    found = [0] * len(seen.cells)
    for x, slope in zip(seen.instructions, slopes, strict=True):
        found[x.block] += of_read(x, slope)
    return jnp.stack(found)


def predictions(logits):
    """The most likely token of logits [..., V], and its probability: [...] each."""
    return logits.argmax(-1).astype(jnp.int32), jax.nn.softmax(logits).max(-1)


@partial(jax.jit, static_argnums=0)
def _flow(f, params, cache, tokens):
    seen = trace(f, params, cache, tokens)
    predicted, probability = predictions(seen.logits)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)

    def of_prediction(t):
        # The logarithm, since a logit by itself may rise with all others.
        objective = lambda logits: jax.nn.log_softmax(logits[t])[predicted[t]]
        return edges(f, params, cache, tokens, objective)

    blocks = range(len(seen.cells))

    def without(cell):
        # Where the cut is, is a number, so that one compiled program makes all of them; no token
        # is at the position len(tokens).
        block, s = cell
        edits = [cut(b, None, jnp.where(b == block, s, len(tokens))) for b in blocks]
        return predictions(run(intervene(f, edits), params, cache, tokens)[1])

    every = [x.ravel() for x in jnp.indices((len(blocks), len(tokens)), dtype=jnp.int32)]
    cuts = jax.lax.map(without, every, batch_size=AT_ONCE)
    return Flow(
        tokens,
        predicted,
        probability,
        jax.lax.map(of_prediction, positions),
        *predictions(lens(f, params, seen)),
        *(x.reshape(len(blocks), len(tokens), -1) for x in cuts),
        block_layers(f, params, seen),
        tuple(b for b in blocks if isinstance(seen.written[b].memory, STATES)),
    )


def without_reads(f: Callable, params, cache: Cache, found: Flow, reads):
    """What becomes of the predictions where one read is cut.

    Args:
      f, params, cache: as in `flow`.
      found: what `flow` gave.
      reads: [R, 3] int, of each read its block, which is no state, the token that reads, and the
        token that wrote the cell.

    Returns:
      (predicted, probability), [R, T] each.

    Raises:
      ValueError: a read does not exist, or is of a state.
    """
    reads = np.asarray(reads, np.int32).reshape(-1, 3)
    length, allowed = (
        len(found.tokens),
        [b for b in range(len(found.layers)) if b not in found.states],
    )
    for block, reader, cell in reads.tolist():
        if block not in allowed or not 0 <= cell <= reader < length:
            raise ValueError(
                f"token {reader} reading the cell of token {cell} in block {block}: a read that "
                f"can be cut is in one of the blocks {', '.join(map(str, allowed))}, of a cell of "
                f"the token itself or of one before, and tokens are 0 to {length - 1}."
            )
    return _without_reads(f, params, cache, found.tokens, tuple(allowed), jnp.asarray(reads))


@partial(jax.jit, static_argnums=(0, 4))
def _without_reads(f, params, cache, tokens, blocks, reads):
    def without(read):
        block, reader, cell = read
        edits = [cut(b, reader, jnp.where(b == block, cell, len(tokens))) for b in blocks]
        return predictions(run(intervene(f, edits), params, cache, tokens)[1])

    return jax.lax.map(without, reads, batch_size=AT_ONCE)
