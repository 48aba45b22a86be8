"""Plain attention: read this one first.

A program is a function of one token. It gets the parameters, the cache, the token and its position
i, and returns the cache and the logits of the token that comes next. It has no axis of time and no
batch. The parallel mode (training, reading a prompt) is `jax.vmap` over the tokens; the sequential
mode (writing a text) is `jax.lax.scan`; `transformer.run` does either.

The cache has a block for each layer, and a block has a cell for each position. The token takes its
turn: it goes through the blocks in order, and at each calls `write_read`, which writes the token's
own cell and then reads the cells up to it. In no other way do tokens reach each other, so all
tokens can write block 0 at once, then all read it, then all go on to block 1.

How a block is written and read is said by a memory. `Cells` keeps every cell, and leaves it to a
function of ours, written for one query, what reading them means: here attention (arXiv:1706.03762)
with one head.
"""

import jax
import jax.numpy as jnp

from examples.programs.parts import feed_forward, feed_forward_shapes, norm, normal
from transformer import Cache, Cells

VOCAB_SIZE, WIDTH, LAYERS = 32, 32, 2


def attend(query, cells, visible, shared):
    """Reads cells, keys and values [S, E], with a query [E]: -> [E]."""
    keys, values = cells
    scores = keys @ query / WIDTH**0.5
    return jax.nn.softmax(jnp.where(visible, scores, -1e30)) @ values


ATTENTION = Cells(attend)


def project(layer, x):
    """What a token writes and what it asks: x [E] -> ((key, value), query)."""
    x = norm(x)
    return (x @ layer["key"], x @ layer["value"]), x @ layer["query"]


def combine(layer, x, z):
    """What a token makes of what it has read: x, z [E] -> [E]."""
    x = x + z @ layer["output"]
    return x + feed_forward(layer, x)


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    names = ("key", "value", "query", "output")
    layer = dict.fromkeys(names, (WIDTH, WIDTH)) | feed_forward_shapes(WIDTH)
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layers": [layer] * LAYERS})


def empty(capacity):
    cell = (WIDTH,), (WIDTH,)  # the shapes of a key and of a value
    return Cache.empty(capacity, [(ATTENTION, cell)] * LAYERS)
