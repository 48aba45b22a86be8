"""A recurrent network: lawful, and slow for a reason that no schedule can mend.

The state goes through a nonlinear function at every token, so no tree of combinations can make the
states: token t waits for token t - 1, within the instruction. It is a program like all others and
every mode gives the same, but where `transformer.depth` counts two instructions for two layers of
attention, whatever the length, here it counts two for each token. Compare linear_attention.py,
whose state is linear.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from examples.programs.parts import feed_forward, feed_forward_shapes, norm, normal
from transformer import Cache, Memory

VOCAB_SIZE, WIDTH, LAYERS = 32, 32, 2


@dataclass(frozen=True)
class Recurrent(Memory):
    """h becomes tanh(h W + x): a cell is x [E], what is read is h, W [E, E] is shared."""

    def empty(self, capacity, cell):
        return jnp.zeros(cell.shape, cell.dtype)

    def step(self, h, i, cell, query, shared):
        h = jnp.tanh(jnp.where(i == 0, 0, h) @ shared + cell)
        return h, h


RECURRENT = Recurrent()


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        turn, h = turn.write_read(RECURRENT, norm(x) @ layer["input"], None, layer["recurrence"])
        x = x + h @ layer["output"]
        x = x + feed_forward(layer, x)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    names = ("input", "recurrence", "output")
    layer = dict.fromkeys(names, (WIDTH, WIDTH)) | feed_forward_shapes(WIDTH)
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layers": [layer] * LAYERS})


def empty(capacity):
    return Cache.empty(capacity, [(RECURRENT, (WIDTH,))] * LAYERS)
