"""Token shift: every channel is a mixture of the token's own value and the value one token before.

RWKV (arXiv:2305.13048) puts it in front of its networks. `Window` is the memory for it: it keeps
the last few cells and nothing more, so the cache does not grow with the sequence. Its read sees
`size` cells, the oldest first and the token's own last; `visible` says which of them exist.

The mixture is a parameter that all tokens have in common, so it is `shared` and no query.
"""

import jax
import jax.numpy as jnp

from examples.programs.parts import norm, normal
from transformer import Cache, Window

VOCAB_SIZE, WIDTH, LAYERS = 32, 32, 2


def mix(query, cells, visible, shared):
    """Mixes two cells [2, E], each by its own part: -> [E]; there is no query."""
    before, own = jnp.where(visible[:, None], cells, 0)
    part = jax.nn.sigmoid(shared)
    return part * own + (1 - part) * before


SHIFT = Window(2, mix)


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        turn, mixed = turn.write_read(SHIFT, norm(x), None, layer["mixture"])
        hidden = jnp.square(jax.nn.relu(mixed @ layer["up"]))
        x = x + jax.nn.sigmoid(mixed @ layer["gate"]) * (hidden @ layer["down"])
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    layer = {
        "mixture": (WIDTH,),
        "up": (WIDTH, 2 * WIDTH),
        "gate": (WIDTH, WIDTH),
        "down": (2 * WIDTH, WIDTH),
    }
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layers": [layer] * LAYERS})


def empty(capacity):
    return Cache.empty(capacity, [(SHIFT, (WIDTH,))] * LAYERS)
