"""How predictions came about: through which cells, read by whom, and what cutting does."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from transformer.insight.attribution import contributions, gradients
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
      lens: [L, T] int32, what the residual stream after each layer says comes next.
      cut_predicted, cut_probability: [blocks, T, T]: with one cell (block, position) cut off from
        all queries, the prediction after each token, and its probability.
      layers: of each block the number of the layer that writes it.
    """

    tokens: jax.Array
    predicted: jax.Array
    probability: jax.Array
    edges: jax.Array
    lens: jax.Array
    cut_predicted: jax.Array
    cut_probability: jax.Array
    layers: tuple[int, ...] = struct.field(pytree_node=False)


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
    """What a number owes to each read of each cell: [blocks, T, T], by block, reader and cell."""
    seen = trace(f, params, cache, tokens)
    slopes = gradients(f, params, cache, tokens, objective, of="read")
    readers = jnp.arange(len(seen.tokens))

    def of_block(block):
        slope = lambda t: jax.tree.map(lambda x: x[t], slopes[block])
        return jax.vmap(lambda t: contributions(seen, block, t, slope(t)))(readers)

    return jnp.stack([of_block(block) for block in range(len(seen.cells))])


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

    blocks = len(seen.cells)

    def without(cell):
        # Where the cut is, is a number, so that one compiled program makes all of them; no token
        # is at the position len(tokens).
        block, s = cell
        edits = [cut(b, None, jnp.where(b == block, s, len(tokens))) for b in range(blocks)]
        return predictions(run(intervene(f, edits), params, cache, tokens)[1])

    every = [x.ravel() for x in jnp.indices((blocks, len(tokens)), dtype=jnp.int32)]
    cuts = jax.lax.map(without, every, batch_size=AT_ONCE)
    return Flow(
        tokens,
        predicted,
        probability,
        jax.lax.map(of_prediction, positions),
        predictions(lens(f, params, seen))[0],
        *(x.reshape(blocks, len(tokens), -1) for x in cuts),
        block_layers(f, params, seen),
    )
