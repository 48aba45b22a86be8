"""How long the ways to run the same tokens take."""

import statistics
from functools import partial

import jax

from experiments.suites.timing import timed
from transformer.modes.compare import ways


def times(config, params, tokens, attention="auto"):
    """Seconds that each way takes over tokens [T], the median of repeated runs: name -> seconds."""
    every = ways(config, attention)
    calls = {name: partial(jax.jit(way), params, tokens) for name, way in every.items()}
    return {name: statistics.median(timed(call, 5, budget=0.5)) for name, call in calls.items()}
