"""`write_read` as one JAX primitive, and what `vmap` means for it.

An axis that `vmap` maps is one of two things:
- positions of one sequence: the cells are mapped, the block is not. All tokens write, then all
  tokens read: one slice update and one attention. Their cells must be consecutive.
- sequences: the block is mapped too, or positions are set already, or all cells are the same.
Positions are mapped once; sequences any number of times, inside or outside of the positions.
"""

import jax.numpy as jnp

from kernels import write_read
from kernels.tracing import primitive

# The operands in order; the last four may be absent, and `names` lists those that are there.
OPERANDS = ("keys", "values", "cells", "k", "v", "q", "layer", "starts", "sinks", "alibi")
BLOCKS = {"keys", "values"}  # without an axis of sequences until one is mapped
SHARED = {"layer", "sinks", "alibi"}  # the same for all sequences
PER_TOKEN = {"cells", "starts", "k", "v", "q"}  # [B, T, ...]
ROWS = {"cells", "starts"}  # [B, T], or [1, T] where all sequences agree


def _run(*operands, names, chunked, options, backend):
    del chunked
    given = dict.fromkeys(OPERANDS) | dict(zip(names, operands, strict=True))
    return list(write_read.write_read(**given, options=options, backend=backend))


def _batch(size, operands, dims, **params):
    names = params["names"]
    given = dict(zip(names, zip(operands, dims, strict=True), strict=True))
    for name in SHARED & set(names):
        if given[name][1] is not None:
            raise NotImplementedError(
                f"write_read cannot map its operand {name!r}, which all sequences of a vmap share; "
                "use jax.lax.map over models instead of jax.vmap."
            )
    block_mapped = given["keys"][1] is not None or given["values"][1] is not None
    if not (params["chunked"] or block_mapped or given["cells"][1] is None):
        return _over_positions(size, given, params)
    return _over_sequences(size, given, params)


def _over_positions(size, given, params):
    """The mapped axis becomes the axis of tokens, which had one element."""

    def fold(name, x, dim):
        if name not in PER_TOKEN:
            return x
        return jnp.repeat(x, size, axis=1) if dim is None else jnp.moveaxis(x, dim, 1).squeeze(2)

    operands = [fold(name, *operand) for name, operand in given.items()]
    keys, values, z = write_read_p.bind(*operands, **(params | {"chunked": True}))
    return (keys, values, z[:, :, None]), (None, None, 1)


def _over_sequences(size, given, params):
    """The mapped axis joins the axis of sequences, or becomes it."""
    given = {
        name: (x if dim is None else jnp.moveaxis(x, dim, 0), dim is not None)
        for name, (x, dim) in given.items()
    }
    q, mapped = given["q"]
    rows = q.shape[1 if mapped else 0]
    keys, mapped = given["keys"]
    batched = keys.ndim - mapped > (4 if "layer" in given else 3)

    def fold(name, x, mapped):
        if name in SHARED or (name in ROWS and not mapped and x.shape[0] == 1):
            return x
        if not mapped:
            x = jnp.broadcast_to(x, (size, *x.shape))
        if name in BLOCKS and not batched:
            return x
        if x.shape[1] != rows:
            x = jnp.broadcast_to(x, (size, rows, *x.shape[2:]))
        return x.reshape(size * rows, *x.shape[2:])

    operands = [fold(name, *operand) for name, operand in given.items()]
    keys, values, z = write_read_p.bind(*operands, **params)
    unfold = lambda x: x.reshape(size, rows, *x.shape[1:])
    if batched:
        keys, values = unfold(keys), unfold(values)
    return (keys, values, unfold(z)), (0, 0, 0)


write_read_p = primitive.define("write_read", _run, _batch)
