"""Keys and values shared between layers (arXiv:2405.12981): half of the layers have no block.

Every second layer asks a question of its own, and reads with it the block that the layer before
has written: `turn.read(n, ...)` reads block n again. The token has written its cell there already,
and so, in the parallel mode, have all others. The cache is half as large.

A block that is not written yet cannot be read: see unlawful/feedback.py.
"""

from examples.programs.attention import ATTENTION, combine, project
from examples.programs.parts import feed_forward_shapes, norm, normal
from transformer import Cache

VOCAB_SIZE, WIDTH, PAIRS = 32, 32, 2


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    pairs = zip(params["writers"], params["readers"], strict=True)
    for n, (writer, reader) in enumerate(pairs):
        cell, query = project(writer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(writer, x, z)
        z = turn.read(n, ATTENTION, norm(x) @ reader["query"])
        x = combine(reader, x, z)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    reader = dict.fromkeys(("query", "output"), (WIDTH, WIDTH)) | feed_forward_shapes(WIDTH)
    writer = reader | dict.fromkeys(("key", "value"), (WIDTH, WIDTH))
    layers = {"writers": [writer] * PAIRS, "readers": [reader] * PAIRS}
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH)} | layers)


def empty(capacity):
    return Cache.empty(capacity, [(ATTENTION, ((WIDTH,), (WIDTH,)))] * PAIRS)
