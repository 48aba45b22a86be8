"""How long the ways to run the same tokens take, and where their bits part."""

import statistics
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.suites.timing import timed
from transformer.insight.trace import trace
from transformer.modes.compare import ways
from transformer.program.init import init_cache
from transformer.program.program import program


def times(config, params, tokens, attention="auto", numerics="fast", names=None):
    """Seconds that each way takes over tokens [T], the median of repeated runs: name -> seconds."""
    every = ways(config, attention, numerics)
    calls = {
        name: partial(jax.jit(every[name]), params, tokens)
        for name in (every if names is None else names)
    }
    return {name: statistics.median(timed(call, 5, budget=0.5)) for name, call in calls.items()}


class Parting(NamedTuple):
    """Where the bits of two ways part first.

    what: "cell", "query" or "read" of a block, or "logits".
    block: the number of the block; None for logits.
    token: the position of the first token that differs.
    difference: the largest, over all tokens.
    """

    what: str
    block: int | None
    token: int
    difference: float


def first_parting(config, params, tokens, attention="auto", numerics="fast", chunk=1):
    """Runs tokens [T] at once and in chunks, and compares all that tokens write, ask and read.

    Returns:
      The first `Parting` in the order in which a token computes; None: all bits are equal.
    """
    f = program(config, numerics=numerics, attention=attention)
    run = jax.jit(partial(trace, f), static_argnames="start")
    whole = run(params, init_cache(config, len(tokens)), tokens)
    cache, parts = init_cache(config, len(tokens)), []
    for begin in range(0, len(tokens), chunk):
        parts.append(run(params, cache, tokens[begin : begin + chunk], start=begin))
        cache = parts[-1].cache
    for (what, block, one), others in zip(
        _made(whole), zip(*map(_made, parts), strict=True), strict=True
    ):
        other = jax.tree.map(lambda *x: jnp.concatenate(x), *(x for _, _, x in others))
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        gaps = [np.abs(np.asarray(x, np.float64) - np.asarray(y)) for x, y in pairs]
        gap = np.max([x.reshape(len(tokens), -1).max(1) for x in gaps], axis=0)
        if gap.any():
            return Parting(what, block, int(np.argmax(gap != 0)), float(gap.max()))
    return None


def _made(made):
    """What tokens made in a trace, in order: (what, block, pytree with a leading axis T)."""
    for reading in made.instructions:
        yield "cell", reading.block, reading.cells
        yield "query", reading.block, reading.queries
        yield "read", reading.block, reading.z
    yield "logits", None, made.logits
