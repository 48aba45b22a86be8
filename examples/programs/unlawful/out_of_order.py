"""Blocks out of order: the cache is turned around before the turn, and back again after it.

The rule it breaks: a program goes through the blocks in order. `cache._blocks` is private, and this
is why.

What it would cost: both modes still agree here, since all that has changed is what the blocks are
called. But what runs programs relies on the order: a cache that is spread over devices by layers,
sent block by block while the next one is computed, or read by a tool that asks for block 0, the
first layer's.
"""

from examples.programs.attention import ATTENTION, VOCAB_SIZE, combine, empty, init, project
from examples.programs.parts import norm

__all__ = ["VOCAB_SIZE", "empty", "init", "program"]


def program(params, cache, token, i):
    turn, x = turned_around(cache).begin(i), params["embedding"][token]
    for layer in params["layers"]:
        cell, query = project(layer, x)
        turn, z = turn.write_read(ATTENTION, cell, query)
        x = combine(layer, x, z)
    return turned_around(turn.end()), norm(x) @ params["embedding"].T


def turned_around(cache):
    """The cache with its blocks in the other order."""
    return cache.replace(_blocks=cache._blocks[::-1])
