"""The feedback transformer (arXiv:2002.09402): a block is read before it is written.

There is one block, of what the *last* layer has made of each token, and every layer reads it. The
idea is strong: also the first layer sees the best that is known of the tokens before.

The rule it breaks: a token reads a block only after it has written it, once. `turn.read` refuses
what is not written yet. Here the turn that `write_read` returns is thrown away instead: each layer
writes a cell that is forgotten, to read the cells of the tokens before, so that the block is
written several times.

What it would cost: token t's first layer waits for token t - 1's last. The chain of instructions is
T x L long instead of L, as `transformer.depth` says, and the sequential mode is the only one. Run
in the parallel mode, this program would read the cells that are forgotten, and give other logits
without a word.
"""

from examples.programs.attention import ATTENTION, VOCAB_SIZE, WIDTH, combine, init, project
from examples.programs.parts import norm
from transformer import Cache

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    turn, x = cache.begin(i), params["embedding"][token]
    for layer in params["layers"]:
        cell, query = project(layer, x)
        _, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    cell, query = project(params["layers"][0], x)
    turn, _ = turn.write_read(ATTENTION, cell, query)
    return turn.end(), norm(x) @ params["embedding"].T


def empty(capacity):
    return Cache.empty(capacity, [(ATTENTION, ((WIDTH,), (WIDTH,)))])
