"""What TransformerLens calls the parts of a run, for those who come from there.

A hook of its stands for an array with an axis of sequences in front; here it is that of one
sequence, with the same axes otherwise.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax

from transformer.insight.residual import config_of, places, stream
from transformer.insight.trace import Trace
from transformer.memory.softmax import Softmax
from transformer.program.params import Params


class Hook(NamedTuple):
    """One part of a run.

    Attributes:
      here: what it is called here, as Python: `seen` is the trace and `stream` its residual stream.
      value: a function without operands that makes the array.
    """

    here: str
    value: Callable[[], jax.Array]


def hooks(f, params: Params, seen: Trace) -> dict[str, Hook]:
    """The parts of a run by the names of TransformerLens's hooks, such as `blocks.0.attn.hook_q`.

    Queries and keys are those that meet in the scores: where positions are rotary they have been
    turned, and their hooks are `hook_rot_q` and `hook_rot_k`. The other way round, from a name here
    to the hook, is `{hook.here: name for name, hook in hooks(...).items()}`.

    Args:
      f, params, seen: as in `stream`.
    """
    config, made = config_of(f), cache(lambda: stream(f, params, seen))
    rotary = "rot_" if config.positions == "rotary" else ""
    found = {"hook_embed": Hook("stream.embedding", lambda: made().embedding)}

    def of_stream(name, part, n):
        found[name] = Hook(f"stream.{part}[{n}]", lambda: getattr(made(), part)[n])

    for n, place in enumerate(places(f, params, seen)):
        for name, part in STREAM.items():
            of_stream(f"blocks.{n}.{name}", part, n)
        reading = place.readings[-1]
        if not isinstance(reading.memory, Softmax) or reading.again:
            continue
        b, at = reading.block, f"blocks.{n}.attn.hook_"
        k, v = reading.cells
        found |= {
            f"{at}{rotary}q": Hook(f"seen.queries[{b}]", lambda x=reading: x.queries),
            f"{at}{rotary}k": Hook(f"seen.cells[{b}][0]", lambda k=k: k),
            f"{at}v": Hook(f"seen.cells[{b}][1]", lambda v=v: v),
            f"{at}z": Hook(f"seen.reads[{b}]", lambda x=reading: x.z),
            f"{at}pattern": Hook(f"seen.weights({b})", lambda b=b: seen.weights(b)),
        }
    return found


# The residual stream's parts in each layer.
STREAM = {
    "hook_resid_pre": "before",
    "hook_attn_out": "mixers",
    "hook_resid_mid": "middle",
    "hook_mlp_out": "feed_forwards",
    "hook_resid_post": "after",
}
