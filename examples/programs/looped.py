"""A looped transformer (arXiv:1807.03819): one layer, run several times with the same weights.

The iterations share their parameters, all but a vector that tells them apart. They cannot share a
block: iteration n reads what all tokens wrote in iteration n, so each has a block of its own. With
that the loop runs over blocks, for all tokens at once, as any other transformer does. What happens
when they do share one is in unlawful/shared_block.py.
"""

from examples.programs.attention import ATTENTION, combine, project
from examples.programs.parts import feed_forward_shapes, norm, normal
from transformer import Cache

VOCAB_SIZE, WIDTH, ITERATIONS = 32, 32, 3


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    layer = params["layer"]
    for iteration in params["iterations"]:
        x = x + iteration
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turn.end(), norm(x) @ params["embedding"].T


def init(key):
    names = ("key", "value", "query", "output")
    layer = dict.fromkeys(names, (WIDTH, WIDTH)) | feed_forward_shapes(WIDTH)
    iterations = {"iterations": (ITERATIONS, WIDTH)}
    return normal(key, {"embedding": (VOCAB_SIZE, WIDTH), "layer": layer} | iterations)


def empty(capacity):
    return Cache.empty(capacity, [(ATTENTION, ((WIDTH,), (WIDTH,)))] * ITERATIONS)
