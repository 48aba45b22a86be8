"""`write_read` and `read` as JAX primitives, and what `vmap` means for them.

The name of the axis that `vmap` maps says what it is:
- "positions": tokens of one sequence. They share the block; all of them write, then all read.
- any other: sequences, each with a block of its own.
Positions are mapped once; sequences any number of times, inside or outside of the positions.

Inside a primitive every operand of a token has the leading axes [B, T], sequences and tokens, which
have one element until they are mapped.
"""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.blocks import Blocks
from kernels.tracing import primitive
from kernels.tracing.linear import linear_call
from transformer.memory.rules import ProgramError, Rule

POSITIONS = "positions"


class Operands(NamedTuple):
    """What the instruction is given.

    arrays: the block, or the blocks of all repeats, as `Blocks.arrays`. For `read` it is a pair:
      the block before its cell was written, and after.
    layer: as in `Blocks`.
    i: [B or 1, T] int32.
    cell, query: pytrees [B, T, ...].
    shared: a pytree.
    """

    arrays: Any
    layer: jax.Array | None
    i: jax.Array
    cell: Any
    query: Any
    shared: Any


# Static parameters of both primitives:
#   memory: what writing and reading mean.
#   tree: the structure of `Operands`.
#   rows: B.
#   batched: whether blocks have an axis of sequences.
#   chunked: whether the tokens' axis is set, by a mapped axis of positions.
#   packed: the capacity, where positions may begin again at 0; else None.


def write_read(memory, operands: Operands, packed: int | None):
    """The instruction for one token: -> (arrays, z)."""
    z_tree = _step_structure(memory, operands, operands.arrays)
    results = _bind(write_read_p, memory, operands, packed)
    arrays = jax.tree.structure(operands.arrays)
    blocks, z = results[: arrays.num_leaves], results[arrays.num_leaves :]
    return jax.tree.unflatten(arrays, blocks), _of_one_token(z_tree, z)


def read(memory, operands: Operands, packed: int | None):
    """Reading again, for one token, a block that it has written: -> z."""
    z_tree = _step_structure(memory, operands, operands.arrays[1])
    return _of_one_token(z_tree, _bind(read_p, memory, operands, packed))


def _of_one_token(tree, leaves):
    return jax.tree.unflatten(tree, [jax.lax.squeeze(x, (0, 1)) for x in leaves])


def _step_structure(memory, operands, arrays):
    """The structure of what `step` reads; checks that it keeps the shapes of the block."""
    stacked = operands.layer is not None
    struct = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    block = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[stacked:], x.dtype), arrays)
    flat, tree = jax.tree.flatten(
        (block, *jax.tree.map(struct, (operands.i, operands.cell, operands.query, operands.shared)))
    )
    return _step_structure_of(memory, tree, tuple(flat), jax.config.jax_enable_x64)


@functools.lru_cache(maxsize=256)
def _step_structure_of(memory, tree, flat, _):
    given = jax.tree.unflatten(tree, flat)
    after, z = jax.eval_shape(memory.step, *given)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    before = given[0]
    if jax.tree.structure(before) != jax.tree.structure(after) or shapes(before) != shapes(after):
        raise ValueError(
            f"the step of {memory} makes a block of shapes {shapes(after)} from one of shapes "
            f"{shapes(before)}; it must return the block in the shapes that it had."
        )
    return jax.tree.structure(z)


def _bind(which, memory, operands, packed):
    one = lambda tree: jax.tree.map(lambda x: jax.lax.expand_dims(x, (0, 1)), tree)
    operands = operands._replace(
        i=one(operands.i), cell=one(operands.cell), query=one(operands.query)
    )
    flat, tree = jax.tree.flatten(operands)
    return which.bind(
        *flat, memory=memory, tree=tree, rows=1, batched=False, chunked=False, packed=packed
    )


def _run_write_read(*flat, memory, tree, packed, batched, **_):
    given = jax.tree.unflatten(tree, flat)
    blocks = Blocks(given.arrays, given.layer, batched)
    if given.i.shape[1] == 1 and packed is None:
        arrays, z = memory.in_place(blocks, *given[2:])
    else:
        block, z = _rows(memory, packed, blocks.take(), given)
        arrays = blocks.put(block)
    return jax.tree.leaves((arrays, z))


def _run_read(*flat, memory, tree, packed, batched, **_):
    given = jax.tree.unflatten(tree, flat)
    before, after = (Blocks(arrays, given.layer, batched) for arrays in given.arrays)
    z = None
    if given.i.shape[1] == 1 and packed is None:
        z = memory.read_in_place(after, given.i, given.query, given.shared)
    if z is None:
        # As when it was written: a chunk may have overwritten what its first tokens see.
        z = _rows(memory, packed, before.take(), given)[1]
    return jax.tree.leaves(z)


def _rows(memory, packed, block, given):
    """One layer's instruction in the form that can be differentiated: -> (block, z)."""
    run = memory.rows if packed is None else partial(memory.documents, packed)
    cells, queries = memory.gather(given.cell, given.query)
    after, z = run(block, given.i, cells, queries, given.shared)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), after, block), z


def _jvp_write_read(fun, primals, moving, tangents, *, memory, tree, packed, batched, **_):
    """Differentiates one layer's `rows`.

    Left to JAX, the gradient of a layer's block, cut out of a stack, would be an array of all L
    blocks, zero but for one, for each of the L layers. So a stack is one linear map, whose
    transpose changes the layer's part of the cotangent in place.
    """
    del fun
    given = jax.tree.unflatten(tree, primals)
    count = len(jax.tree.leaves(given.arrays))

    def rows(primals, block, others):
        """From the leaves of one layer's block, and of what else moves, to those of the results."""
        operands = list(primals)
        for n, x in zip(others_at, others, strict=True):
            operands[n] = x
        given = jax.tree.unflatten(tree, operands)
        block = jax.tree.unflatten(jax.tree.structure(given.arrays), block)
        return tuple(map(jax.tree.leaves, _rows(memory, packed, block, given)))

    others_at = [n for n in moving if n >= count]
    others = [primals[n] for n in others_at]
    given_tangents = dict(zip(moving, tangents, strict=True))
    other_tangents = [given_tangents[n] for n in others_at]
    stack = lambda arrays: Blocks(list(arrays), given.layer, batched)
    block = stack(primals[:count]).take()
    array_tangents = [
        given_tangents[n] if n in given_tangents else _zero_tangent(primals[n])
        for n in range(count)
    ]
    if given.layer is None:
        (block, z), (block_tangents, z_tangents) = jax.jvp(
            partial(rows, primals), (block, others), (stack(array_tangents).take(), other_tangents)
        )
        put = stack(primals[:count]).put
        return [*put(block), *z], [*put(block_tangents), *z_tangents]
    (after, z), vjp = jax.vjp(partial(rows, primals), block, others)
    results = [*stack(primals[:count]).put(after), *z]

    def tangent(residuals, operands):
        primals, layer, block, others, _ = residuals
        arrays, others_tangents = operands
        blocks = Blocks(arrays, layer, batched)
        _, (block_tangents, z_tangents) = jax.jvp(
            partial(rows, primals), (block, others), (blocks.take(), others_tangents)
        )
        return blocks.put(block_tangents), z_tangents

    def transpose(residuals, cotangents):
        _, layer, _, _, vjp = residuals
        arrays, dz = cotangents
        blocks = Blocks(arrays, layer, batched)
        dblock, dothers = vjp((blocks.take(), dz))
        return blocks.put(dblock), dothers

    residuals = list(primals), given.layer, block, others, vjp
    arrays, z_tangents = linear_call(
        tangent, transpose, residuals, (array_tangents, other_tangents)
    )
    return results, [*arrays, *z_tangents]


def _jvp_read(fun, primals, moving, tangents, *, memory, tree, packed, batched, **params):
    """A read that is differentiated is made from the block as it was before the write."""

    def rows(*flat, **_):
        given = jax.tree.unflatten(tree, flat)
        before = Blocks(given.arrays[0], given.layer, batched).take()
        return jax.tree.leaves(_rows(memory, packed, before, given)[1])

    return primitive.jvp_of_moving(rows, primals, moving, tangents)


def _zero_tangent(x):
    aval = jax.typeof(x).to_tangent_aval()
    return (
        np.zeros(aval.shape, aval.dtype) if aval.dtype == jax.dtypes.float0 else jnp.zeros_like(x)
    )


def _batch(which, axis, flat, dims, **params):
    if axis.name == POSITIONS:
        return _over_positions(which, axis.size, flat, dims, **params)
    if all(dim is None for dim in dims):
        results = which.bind(*flat, **params)
        return results, [None] * len(results)
    return _over_sequences(which, axis.size, flat, dims, **params)


def _over_positions(which, size, flat, dims, *, tree, chunked, **params):
    """The mapped axis becomes the axis of tokens, which had one element."""
    of = Operands(*jax.tree.unflatten(tree, [dim is not None for dim in dims]))
    if chunked:
        raise ProgramError(
            f'an axis "{POSITIONS}" is mapped inside of another one; the positions of a sequence '
            "are one axis. Give axes of sequences another name, or none.",
            Rule.APART,
        )
    if any(jax.tree.leaves((of.arrays, of.layer))):
        raise ProgramError(
            "the block differs from position to position of one sequence: what its tokens share is "
            'the cache, so map it with None over "positions". A block that depends on the running '
            "token would let tokens reach each other without a cell.",
            Rule.PRIVATE,
        )
    if any(jax.tree.leaves(of.shared)):
        raise ProgramError(
            "`shared` differs from token to token; it is what all tokens have in common. Put what "
            "depends on the token into the query.",
            Rule.APART,
        )
    if not of.i:
        raise ProgramError(
            "all tokens of an axis of positions are at the same position i; map i too, or give "
            'the axis another name than "positions", which makes it an axis of sequences.',
            Rule.OWN,
        )

    def fold(x, dim):
        return jnp.repeat(x, size, axis=1) if dim is None else jnp.moveaxis(x, dim, 1).squeeze(2)

    given, at = (jax.tree.unflatten(tree, x) for x in (flat, [_Dim(dim) for dim in dims]))
    fold_tree = lambda x, at: jax.tree.map(lambda x, dim: fold(x, dim.axis), x, at)
    given = given._replace(
        i=fold_tree(given.i, at.i),
        cell=fold_tree(given.cell, at.cell),
        query=fold_tree(given.query, at.query),
    )
    results = which.bind(*jax.tree.leaves(given), tree=tree, chunked=True, **params)
    count = _num_blocks(which, given)
    z = [x[:, :, None] for x in results[count:]]
    return [*results[:count], *z], [*[None] * count, *[1] * len(z)]


def _over_sequences(which, size, flat, dims, *, tree, rows, batched, **params):
    """The mapped axis joins the axis of sequences, or becomes it."""
    given, at = (jax.tree.unflatten(tree, x) for x in (flat, [_Dim(dim) for dim in dims]))
    if any(dim.axis is not None for dim in jax.tree.leaves((at.shared, at.layer))):
        # What all sequences share, as for an ensemble of models.
        return primitive.in_turn(which, flat, dims, tree=tree, rows=rows, batched=batched, **params)

    def fold_token(x, dim):
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim.axis is None else _front(x, dim)
        return x.reshape(size * rows, *x.shape[2:])

    def fold_block(x, dim):
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim.axis is None else _front(x, dim)
        return x.reshape(size * rows, *x.shape[2:]) if batched else x

    def fold_position(i, dim):
        if dim.axis is None and i.shape[0] == 1:
            return i
        i = jnp.broadcast_to(i, (size, *i.shape)) if dim.axis is None else _front(i, dim)
        return jnp.broadcast_to(i, (size, rows, i.shape[2])).reshape(size * rows, -1)

    folded = Operands(
        arrays=jax.tree.map(fold_block, given.arrays, at.arrays),
        layer=given.layer,
        i=fold_position(given.i, at.i),
        cell=jax.tree.map(fold_token, given.cell, at.cell),
        query=jax.tree.map(fold_token, given.query, at.query),
        shared=given.shared,
    )
    results = which.bind(
        *jax.tree.leaves(folded), tree=tree, rows=size * rows, batched=True, **params
    )
    count = _num_blocks(which, given)
    unfold = lambda x: x.reshape(size, rows, *x.shape[1:])
    blocks = map(unfold, results[:count]) if batched else results[:count]
    return [*blocks, *map(unfold, results[count:])], [0] * len(results)


@dataclass(frozen=True)
class _Dim:
    """A mapped axis, or None, as a leaf of a pytree."""

    axis: int | None


def _front(x, dim):
    return jnp.moveaxis(x, dim.axis, 0)


def _num_blocks(which, given):
    return len(jax.tree.leaves(given.arrays)) if which is write_read_p else 0


write_read_p = primitive.define(
    "write_read",
    _run_write_read,
    lambda *args, **params: _batch(write_read_p, *args, **params),
    _jvp_write_read,
)
read_p = primitive.define(
    "read", _run_read, lambda *args, **params: _batch(read_p, *args, **params), _jvp_read
)
