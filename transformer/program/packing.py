"""Parameters whose matrices lie as products of few rows are fastest on a CPU."""

from collections.abc import Callable

import jax

from kernels.cpu.product import panels as jax_panels
from transformer.numerics.layouts import lay_out, lay_out_table
from transformer.program.experts import Experts
from transformer.program.latent import LatentAttention
from transformer.program.linear import Linear
from transformer.program.params import Params

# What is not multiplied by with `Numerics.dot`, but as a whole or by groups of rows.
_AS_THEY_ARE = {LatentAttention: ("key", "value"), Experts: ("up", "gate", "down")}


def pack(params: Params, exact: bool = False, panels: Callable = jax_panels) -> Params:
    """Parameters with their matrices in panels, where that is another way than they lie.

    Args:
      params: the parameters.
      exact: whether they are for exact products alone.
      panels: as in `transformer.numerics.layouts.lay_out`.
    """
    takes = lambda x: isinstance(x, (Linear, *_AS_THEY_ARE))

    def one(part):
        if isinstance(part, Linear):
            return part.replace(weight=lay_out(part.weight, exact, panels))
        if not takes(part):
            return part
        kept = {name: getattr(part, name) for name in _AS_THEY_ARE[type(part)]}
        others = part.replace(**dict.fromkeys(kept))
        inner = lambda x: x is not others and takes(x)
        return jax.tree.map(one, others, is_leaf=inner).replace(**kept)

    table = params.embedding
    if params.output is None:
        table = lay_out_table(table, exact, panels)
    rest = jax.tree.map(one, params.replace(embedding=None), is_leaf=takes)
    return rest.replace(embedding=table)
