"""A looped transformer whose iterations share one block.

It looks like a saving: the weights are the same in every iteration, so why not the cells?

The rule it breaks: a program writes each block exactly once. The second iteration writes the cell
again, and `turn.write_read` refuses it, since the cache has no block left.

What it would cost: which cells would iteration 1 of token t read? Those that token t - 1 left after
its last iteration, in the sequential mode; those of iteration 1, in the parallel mode. Only the
sequential mode could be kept, T x iterations deep. ../looped.py has a block for each iteration.
"""

from examples.programs.attention import ATTENTION, combine, project
from examples.programs.looped import VOCAB_SIZE, WIDTH, init
from examples.programs.parts import norm
from transformer import Cache

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    layer = params["layer"]
    for iteration in params["iterations"]:
        x = x + iteration
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turn.end(), norm(x) @ params["embedding"].T


def empty(capacity):
    return Cache.empty(capacity, [(ATTENTION, ((WIDTH,), (WIDTH,)))])
