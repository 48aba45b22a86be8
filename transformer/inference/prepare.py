"""Parameters made ready for a loop of many steps, so that no step does it again."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from kernels.tracing.target import platform
from transformer.config import Config
from transformer.numerics.matrix import is_matrix
from transformer.program.experts import Experts
from transformer.program.linear import Linear
from transformer.program.packing import pack
from transformer.program.params import Params
from transformer.program.program import Program

pack_params = jax.jit(pack, static_argnames="exact")


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
    # Traced once for each structure: `generate` asks at every call.
    lie = pack_params.eval_shape(params, exact=f.numerics.exact)
    if jax.tree.structure(lie) == jax.tree.structure(params):
        return params
    return pack_params(params, exact=f.numerics.exact)


@partial(jax.jit, static_argnames="config")
def _cast(config, params: Params) -> Params:
    to_dtype = lambda x: x if is_matrix(x) else x.astype(config.compute_dtype)
    cast = partial(jax.tree.map, to_dtype, is_leaf=is_matrix)
    takes = lambda x: isinstance(x, (Linear, Experts))
    params = jax.tree.map(lambda x: cast(x) if takes(x) else x, params, is_leaf=takes)
    return params.replace(embedding=cast(params.embedding))
