"""The looped transformer again, its loop compiled once instead of written out.

`turn.scan` runs a function of (turn, x, parameters of the iteration) as often as the cache has
repeats of its blocks, which are then stacked in one array. The program becomes as small as one
iteration, and so does the time to compile it. Layers whose parameters differ are scanned in the
same way: stack their parameters.
"""

from examples.programs.attention import ATTENTION, combine, project
from examples.programs.looped import ITERATIONS, VOCAB_SIZE, WIDTH, init
from examples.programs.parts import norm
from transformer import Cache

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    layer = params["layer"]

    def iterate(turn, x, iteration):
        x = x + iteration
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        return turn, combine(layer, x, z)

    x = params["embedding"][token]
    turn, x = cache.begin(i).scan(iterate, x, params["iterations"])
    return turn.end(), norm(x) @ params["embedding"].T


def empty(capacity):
    cell = (WIDTH,), (WIDTH,)
    return Cache.empty(capacity, [(ATTENTION, cell)], repeats=ITERATIONS)
