"""The gated delta rule (arXiv:2412.06464), as a memory of one's own.

The state is a matrix that maps keys to values. A token lets it fade a little, looks up what the
state holds at its key, and moves that towards its value. To write such a memory it is enough to say
what one token does: `step`. The parallel mode follows from it, token after token inside the
instruction; a memory that knows a faster way also gives `chunk`, which must equal the scan of
`step`.

Two things every memory owes: position -1 is padding, which `Memory` sees to here, and a token at
position 0 begins a sequence, whatever the block holds.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from examples.programs.parts import feed_forward, feed_forward_shapes, norm, normal
from transformer import Cache, Memory

VOCAB_SIZE, WIDTH, LAYERS, SIZE = 32, 32, 2, 16


@dataclass(frozen=True)
class GatedDelta(Memory):
    """A cell is (key [H], value [H], kept, rate); a query is [H]; a block is the state [H, H]."""

    def empty(self, capacity, cell):
        key, value, _, _ = cell
        return jnp.zeros((*key.shape, *value.shape), value.dtype)

    def step(self, state, i, cell, query, shared):
        key, value, kept, rate = cell
        state = kept * jnp.where(i == 0, 0, state)
        state = state + rate * jnp.outer(key, value - key @ state)
        return state, query @ state


DELTA = GatedDelta()


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        y = norm(x)
        key, query = (norm(y @ layer[name]) / SIZE**0.5 for name in ("key", "query"))  # length 1
        kept, rate = jax.nn.sigmoid(y @ layer["gates"])
        turn, z = turn.write_read(DELTA, (key, y @ layer["value"], kept, rate), query)
        x = x + z @ layer["output"]
        x = x + feed_forward(layer, x)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    layer = dict.fromkeys(("key", "value", "query"), (WIDTH, SIZE))
    layer |= {"gates": (WIDTH, 2), "output": (SIZE, WIDTH)} | feed_forward_shapes(WIDTH)
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layers": [layer] * LAYERS})


def empty(capacity):
    return Cache.empty(capacity, [(DELTA, ((SIZE,), (SIZE,), (), ()))] * LAYERS)
