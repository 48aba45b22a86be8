"""A Python list as hidden state: what a token leaves in it, the next token finds.

Called token by token, it works, and every token sees a summary of those before.

The rule it breaks: nothing but the cache survives a token.

What it would cost: a mode that traces the program runs this Python once, for all tokens. The list
then holds one tracer, not T states; in the parallel mode each token would see itself, in the
sequential mode none would see another, and the second trace finds what the first left behind. What
must survive a token belongs in a cell: see ../token_shift.py and ../recurrent.py.
"""

from examples.programs.attention import ATTENTION, VOCAB_SIZE, combine, empty, init, project
from examples.programs.parts import norm

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]

PAST = []


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    PAST.append(x)
    x = x + sum(PAST) / len(PAST)
    for layer in params["layers"]:
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turn.end(), norm(x) @ params["embedding"].T
