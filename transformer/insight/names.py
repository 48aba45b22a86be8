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
    turned, and their hooks are `hook_rot_q` and `hook_rot_k`; those of a delta rule have the length
    1, and there is one for each head of values. Latent attention never makes keys and values of
    heads; what its cells hold is `hook_kv_latent` and, turned, `hook_rot_k`. The other way round,
    from a name here to the hook, is `{hook.here: name for name, hook in hooks(...).items()}`.

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
        if place.spec.kind in PARTS:
            parts = PARTS[place.spec.kind](seen, place.readings[-1], rotary)
            found |= {f"blocks.{n}.{name}": hook for name, hook in parts.items()}
    return found


# The residual stream's parts in each layer.
STREAM = {
    "hook_resid_pre": "before",
    "hook_attn_out": "mixers",
    "hook_resid_mid": "middle",
    "hook_mlp_out": "feed_forwards",
    "hook_resid_post": "after",
}


def _attention(seen, reading, rotary):
    """The hooks of a layer of attention; one that reads a block again has no keys of its own."""
    b, nth = reading.block, reading.read
    if reading.again:
        at = next(n for n, x in enumerate(seen.instructions) if x is reading)
        queries, reads, pattern = (
            f"seen.instructions[{at}].queries",
            f"seen.instructions[{at}].z",
            f"seen.weights({b}, read={nth})",
        )
    else:
        queries, reads, pattern = f"seen.queries[{b}]", f"seen.reads[{b}]", f"seen.weights({b})"
    found = {
        f"attn.hook_{rotary}q": Hook(queries, lambda: reading.queries),
        "attn.hook_z": Hook(reads, lambda: reading.z),
        "attn.hook_pattern": Hook(pattern, lambda: seen.weights(b, read=nth)),
    }
    if reading.again:
        return found
    return found | {
        f"attn.hook_{rotary}k": Hook(f"seen.cells[{b}][0]", lambda: reading.cells[0]),
        "attn.hook_v": Hook(f"seen.cells[{b}][1]", lambda: reading.cells[1]),
    }


def _latent(seen, reading, rotary):
    """The hooks of a layer of latent attention."""
    b, rank = reading.block, reading.memory.rank
    cells = reading.cells
    return {
        "attn.hook_kv_latent": Hook(f"seen.cells[{b}][:, :{rank}]", lambda: cells[:, :rank]),
        "attn.hook_rot_k": Hook(f"seen.cells[{b}][:, {rank}:]", lambda: cells[:, rank:]),
        "attn.hook_rot_q": Hook(f"seen.queries[{b}][1]", lambda: reading.queries[1]),
        "attn.hook_z": Hook(f"seen.reads[{b}]", lambda: reading.z),
        "attn.hook_pattern": Hook(f"seen.weights({b})", lambda: seen.weights(b)),
    }


def _delta(seen, reading, rotary):
    """The hooks of a layer of the delta rule, whose state has no weights."""
    b = reading.block
    found = {
        f"linear_attn.hook_{name}": Hook(f"seen.cells[{b}][{n}]", lambda n=n: reading.cells[n])
        for n, name in enumerate(("k", "v", "log_decay", "beta"))
    }
    return found | {
        "linear_attn.hook_q": Hook(f"seen.queries[{b}]", lambda: reading.queries),
        "linear_attn.hook_recurrence_out": Hook(f"seen.reads[{b}]", lambda: reading.z),
    }


# What a layer of each kind has: functions (trace, its last instruction, "rot_" or "") -> hooks.
PARTS = {"attention": _attention, "latent": _latent, "delta": _delta}
