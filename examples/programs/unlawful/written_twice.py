"""A block written twice: the token takes two turns.

After its layers the token goes through them once more, to correct its cells with what it has
learned from reading.

The rule it breaks: a program writes each block exactly once. A turn sees to that, and a second turn
goes around it: the cache of the first is the beginning of the second.

What it would cost: the first turn of token t would read the corrected cells of the tokens before
in the sequential mode, and the uncorrected ones in the parallel mode. The modes disagree, and the
only right one is T x L deep.
"""

from examples.programs.attention import ATTENTION, VOCAB_SIZE, combine, empty, init, project
from examples.programs.parts import norm

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    x = params["embedding"][token]
    for _ in ("think", "correct"):
        turn = cache.begin(i)
        for layer in params["layers"]:
            cell, query = project(layer, x)
            turn, z = turn.write_read(ATTENTION, cell, query)
            x = combine(layer, x, z)
        cache = turn.end()
    return cache, norm(x) @ params["embedding"].T
