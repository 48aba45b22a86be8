"""How a model is kept once it is read: on which devices, and how its matrices lie."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from transformer.config import Config
from transformer.numerics.layouts import Packed, Table, lay_out, lay_out_table
from transformer.numerics.matrix import Matrix, is_matrix
from transformer.numerics.quantised import quantise
from transformer.program.experts import Experts
from transformer.program.linear import Linear
from transformer.program.packing import pack
from transformer.program.params import Params
from transformer.storage.arrays import flat
from transformer.storage.buffers import contiguous, panels

INT8 = ("int8",)
WEIGHTS = (*INT8, "panels")

# Where the parameter of a name is placed: on a device, or split over several.
Sharding = Callable[[str], jax.sharding.Sharding]
# What is done while parameters are read: prepare(config, params), the parameters being shapes.
Prepare = Callable[[Config, Params], None]
# From the numbers of a parameter to how they are kept.
Form = Callable[[np.ndarray], np.ndarray | Matrix]


@dataclass(frozen=True)
class Keeping:
    """How a model is kept.

    Attributes:
      sharding: sharding(name) is where the parameter of a name is placed; None: on the first
        device.
      weights: "int8": matrices are `Quantised`, those of experts left out; "panels": they are
        `Packed` where products of few rows are faster so; None: as they are read.
      cache: the config's `cache_dtype`.
      prepare: what is done while the parameters are read; None: nothing.

    Raises:
      ValueError: weights or cache is something else, or panels are to be split over devices.
    """

    sharding: Sharding | None = None
    weights: str | None = None
    cache: str | None = None
    prepare: Prepare | None = None

    def __post_init__(self):
        for name, choices in (("weights", WEIGHTS), ("cache", INT8)):
            if getattr(self, name) not in (None, *choices):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; choose one of {', '.join(choices)}, or None."
                )
        if self.weights == "panels" and self.sharding is not None:
            raise ValueError("weights='panels' is for one device; leave `sharding` or it out.")

    def shapes(self, params: Params) -> Params:
        """The shapes of parameters in panels, if that is how they are kept; of others as given."""
        return jax.eval_shape(pack, params) if self.weights == "panels" else params

    def forms(self, params: Params, shapes: Params) -> Mapping[str, Form]:
        """form(x) of each parameter, by its name: how its numbers x are kept.

        Needs no device, and may run in any thread.

        Args:
          params: the parameters, or their shapes.
          shapes: those of `shapes`.
        """
        forms = dict.fromkeys(flat(params), contiguous)
        kept = zip(forms, jax.tree.leaves(shapes, is_leaf=is_matrix), strict=True)
        forms |= {name: _PACKING[type(x)] for name, x in kept if is_matrix(x)}
        if self.weights == "int8":
            tables = _matrices(params)
            forms |= {name: partial(_quantised, is_table) for name, is_table in tables.items()}
        return forms

    def place(self, name: str, x: np.ndarray | Matrix) -> jax.Array | Matrix:
        """Puts a parameter where it is kept."""
        # None is the first device, and not "this device and no other": arrays that are bound to one
        # would have the first step of `decode` compiled again, whose state is not bound yet.
        return jax.device_put(x, self.sharding and self.sharding(name))


def _quantised(is_table, x):
    return quantise(contiguous(x), is_table=is_table)


_PACKING = {
    Packed: lambda x: lay_out(x, exact=False, panels=panels),
    Table: lambda x: lay_out_table(contiguous(x), exact=False, panels=panels),
}


def _matrices(params):
    """The names of the matrices that tokens are multiplied with, and whether each is a table."""
    parts = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, Linear | Experts)
    )
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    found = {f"{name(path)}.weight": False for path, part in parts if isinstance(part, Linear)}
    return found if params.output is not None else found | {"embedding": True}
