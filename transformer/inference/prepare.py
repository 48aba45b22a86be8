"""Parameters made ready for a loop of many steps, so that no step does it again."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels.tracing.target import platform
from transformer.config import Config
from transformer.numerics.layouts import lay_out, lay_out_table
from transformer.numerics.matrix import is_matrix
from transformer.program.experts import Experts
from transformer.program.latent import LatentAttention
from transformer.program.linear import Linear
from transformer.program.params import Params
from transformer.program.program import Program

# What is not multiplied by with `Numerics.dot`, but as a whole or by groups of rows.
_AS_THEY_ARE = {LatentAttention: ("key", "value"), Experts: ("up", "gate", "down")}


def cast_params(config: Config, params: Params) -> Params:
    """Parameters in the type in which the program uses them."""
    return params if config.compute_dtype == jnp.float32 else _cast(config, params)


def lay_out_params(f: Callable, params: Params) -> Params:
    """Parameters of f whose matrices lie as products of few rows are fastest on a CPU.

    Those that lie otherwise than before are copies. Elsewhere than on a CPU, where parameters are
    split over devices, and for a program of a user's own, all stay as they are.
    """
    is_placed = lambda x: isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    split = any(len(x.devices()) > 1 for x in filter(is_placed, jax.tree.leaves(params)))
    if split or platform() != "cpu" or not isinstance(f, Program):
        return params
    return _lay_out(params, f.numerics.exact)


@partial(jax.jit, static_argnames="config")
def _cast(config, params: Params) -> Params:
    to_dtype = lambda x: x if is_matrix(x) else x.astype(config.compute_dtype)
    cast = partial(jax.tree.map, to_dtype, is_leaf=is_matrix)
    takes = lambda x: isinstance(x, (Linear, Experts))
    params = jax.tree.map(lambda x: cast(x) if takes(x) else x, params, is_leaf=takes)
    return params.replace(embedding=cast(params.embedding))


@partial(jax.jit, static_argnames="exact")
def _lay_out(params: Params, exact) -> Params:
    takes = lambda x: isinstance(x, (Linear, *_AS_THEY_ARE))

    def one(part):
        if isinstance(part, Linear):
            return part.replace(weight=lay_out(part.weight, exact))
        if not takes(part):
            return part
        kept = {name: getattr(part, name) for name in _AS_THEY_ARE[type(part)]}
        others = part.replace(**dict.fromkeys(kept))
        inner = lambda x: x is not others and takes(x)
        return jax.tree.map(one, others, is_leaf=inner).replace(**kept)

    table = params.embedding
    if params.output is None:
        table = lay_out_table(table, exact)
    rest = jax.tree.map(one, params.replace(embedding=None), is_leaf=takes)
    return rest.replace(embedding=table)
