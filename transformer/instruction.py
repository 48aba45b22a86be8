"""`write_read` as one JAX primitive, and what `vmap` means for it.

An axis that `vmap` maps is one of two things:
- positions of one sequence: the cells are mapped, the block is not. All tokens write, then all
  tokens read: one slice update and one attention. Their cells must be consecutive.
- sequences: the block is mapped too, or positions are set already, or all cells are the same.
Positions are mapped once; sequences any number of times, inside or outside of the positions.
"""

import jax.numpy as jnp

from kernels import primitive, write_read

# The operands in order; the last three may be absent, and `names` lists those that are there.
OPERANDS = ("keys", "values", "layer", "cells", "k", "v", "q", "starts", "sinks", "alibi")
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
    if params["chunked"] or block_mapped or given["cells"][1] is None:
        results = write_read_p.bind(*_fold_sequences(size, given), **params)
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], (0, 0, 0)
    keys, values, z = write_read_p.bind(
        *_fold_positions(size, given), **(params | {"chunked": True})
    )
    return (keys, values, z[:, :, None]), (None, None, 1)


def _fold_positions(size, given):
    """The mapped axis becomes the axis of tokens, which had one element."""
    for name, (x, dim) in given.items():
        if name not in PER_TOKEN:
            yield x
        elif dim is None:
            yield jnp.repeat(x, size, axis=1)
        else:
            yield jnp.moveaxis(x, dim, 1).squeeze(2)


def _fold_sequences(size, given):
    """The mapped axis joins the axis of sequences."""
    q, dim = given["q"]
    rows = q.shape[0] if dim is None else jnp.moveaxis(q, dim, 0).shape[1]
    for name, (x, dim) in given.items():
        if name in SHARED or (dim is None and name in ROWS and x.shape[0] == 1):
            yield x
            continue
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        if x.shape[1] != rows:
            x = jnp.broadcast_to(x, (size, rows, *x.shape[2:]))
        yield x.reshape(size * rows, *x.shape[2:])


write_read_p = primitive.define("write_read", _run, _batch)
