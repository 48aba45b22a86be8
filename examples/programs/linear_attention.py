"""Linear attention (arXiv:2006.16236): the cells so far are summed into one state.

Without the softmax, a query reads a sum over cells, and a sum needs no cells kept: `Fold` keeps
what they amount to. A block is then one state, of the same shapes as a cell, and a token costs the
same at every position. `Fold` needs an associative `combine` and its identity; with these it makes
the states of all tokens by a tree of combinations, about log2(T) deep, where the sequential mode
combines one by one.
"""

import jax
import jax.numpy as jnp

from examples.programs.parts import feed_forward, feed_forward_shapes, norm, normal
from transformer import Cache, Fold

VOCAB_SIZE, WIDTH, LAYERS = 32, 32, 2


def add(a, b):
    """Combines two states."""
    return jax.tree.map(jnp.add, a, b)


def divide(query, state, shared):
    """The mean of the values, weighted by how alike query and keys are: query [E] -> [E]."""
    return query @ state["values"] / (query @ state["keys"] + 1e-6)


SUM = Fold(add, divide, identity=0)


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        y = norm(x)
        key, query = (jax.nn.softplus(y @ layer[name]) for name in ("key", "query"))
        cell = {"values": jnp.outer(key, y @ layer["value"]), "keys": key}
        turn, z = turn.write_read(SUM, cell, query)
        x = x + z @ layer["output"]
        x = x + feed_forward(layer, x)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    names = ("key", "value", "query", "output")
    layer = dict.fromkeys(names, (WIDTH, WIDTH)) | feed_forward_shapes(WIDTH)
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layers": [layer] * LAYERS})


def empty(capacity):
    state = {"values": (WIDTH, WIDTH), "keys": (WIDTH,)}
    return Cache.empty(capacity, [(SUM, state)] * LAYERS)
