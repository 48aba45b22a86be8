"""A norm whose mean is taken over all tokens: it uses the axis of positions by its name.

Centring the hidden state over the sequence, as batch norm does, is one line: in the parallel mode
the tokens are an axis, and `jax.lax.pmean` takes the mean over it.

The rule it breaks: nothing but `write_read` connects tokens, and no operation mixes the axis
"positions".

What it would cost: the logits of a token depend on the tokens after it, so that in training the
model sees what it is asked to predict; and in the sequential mode there is no such axis at all.
"""

import jax

from examples.programs.attention import ATTENTION, VOCAB_SIZE, combine, empty, init, project
from examples.programs.parts import norm

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        x = x - jax.lax.pmean(x, "positions")
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turn.end(), norm(x) @ params["embedding"].T
