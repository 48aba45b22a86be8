"""How a model is kept once it is read: on which devices, and what of it as int8."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from transformer.config import Config
from transformer.numerics.quantised import Quantised, quantise
from transformer.program.experts import Experts
from transformer.program.linear import Linear
from transformer.program.params import Params

INT8 = ("int8",)

# Where the parameter of a name is placed: on a device, or split over several.
Sharding = Callable[[str], jax.sharding.Sharding]
# What is done while parameters are read: prepare(config, params), the parameters being shapes.
Prepare = Callable[[Config, Params], None]


@dataclass(frozen=True)
class Keeping:
    """How a model is kept.

    Attributes:
      sharding: sharding(name) is where the parameter of a name is placed; None: on the first
        device.
      weights: "int8": matrices are `Quantised`, those of experts left out; None: as they are read.
      cache: the config's `cache_dtype`.
      prepare: what is done while the parameters are read; None: nothing.

    Raises:
      ValueError: weights or cache is something else.
    """

    sharding: Sharding | None = None
    weights: str | None = None
    cache: str | None = None
    prepare: Prepare | None = None

    def __post_init__(self):
        for name in ("weights", "cache"):
            if getattr(self, name) not in (None, *INT8):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; choose one of {', '.join(INT8)}, or None."
                )

    def placing(self, params: Params) -> Callable[[str, np.ndarray], jax.Array | Quantised]:
        """place(name, x) keeps the numbers x of a parameter; `params` may be shapes only."""
        matrices = {} if self.weights is None else _matrices(params)
        # None is the first device, and not "this device and no other": arrays that are bound to one
        # would have the first step of `decode` compiled again, whose state is not bound yet.
        sharding = self.sharding or (lambda _: None)

        def place(name, x):
            if name in matrices:
                x = quantise(np.asarray(x), is_table=matrices[name])
            return jax.device_put(x, sharding(name))

        return place


def _matrices(params):
    """The names of the matrices that tokens are multiplied with, and whether each is a table."""
    parts = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: isinstance(x, Linear | Experts)
    )
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    found = {f"{name(path)}.weight": False for path, part in parts if isinstance(part, Linear)}
    return found if params.output is not None else found | {"embedding": True}
