"""A cell written at i + 1, by an index made by hand.

The token leaves its cell where the next token will look first.

The rule it breaks: a token writes its own cell, i, and reads cells 0..i. `write_read` takes no
index, but the turn can be begun at a position that is not the token's.

What it would cost: the token at the last position writes past the end of the cache; padding, which
is position -1, becomes position 0 and overwrites it; token 0 reads a cell 0 that nobody has
written, which is zeros in a new cache and the last owner's cell in one that is used again.
"""

from examples.programs.attention import ATTENTION, VOCAB_SIZE, combine, empty, init, project
from examples.programs.parts import norm

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    turn, x = cache.begin(i + 1), params["embedding"][token]
    for layer in params["layers"]:
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turn.end(), norm(x) @ params["embedding"].T
