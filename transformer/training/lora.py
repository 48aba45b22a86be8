"""Low-rank adapters (LoRA, arXiv:2106.09685): of a model that is there, few numbers are trained.

A matrix W of a layer becomes W + alpha / rank * A B. A program never sees the adapters: they are
added to the parameters before it runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from transformer.checks import whole_number
from transformer.program.params import Params
from transformer.training.optimizer import layer_matrices


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices have adapters, and of which size.

    Attributes:
      rank: of the product A B, at least 1; None: there are no adapters, and all parameters are
        trained.
      alpha: A B is multiplied by alpha / rank.
      targets: the names of matrices in `Params.layers`, as ("query", "value"); None: all of them.

    Raises:
      ValueError, TypeError: a value is out of its range.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.rank is not None:
            whole_number("rank", self.rank, least=1)


@struct.dataclass
class Adapter:
    """a: [..., in, rank]; b: [..., rank, out]."""

    a: jax.Array
    b: jax.Array


@struct.dataclass
class Adapters:
    """Adapters by the paths of their matrices, as `layers.0.mixer.query.weight`; their factor."""

    adapters: Mapping[str, Adapter]
    factor: float = struct.field(pytree_node=False)


def init_adapters(config: LoraConfig, params: Params, key: jax.Array) -> Adapters:
    """Makes fresh adapters, which change nothing yet: A is random, B is zeros.

    Args:
      config: has a rank.
      params: what they will be added to.
      key: a random key.

    Raises:
      ValueError: a target is the name of no matrix; says which there are.
    """
    paths, _ = jax.tree.flatten_with_path(params)
    matrices = {
        _name(path): x
        for (path, x), is_matrix in zip(paths, jax.tree.leaves(layer_matrices(params)), strict=True)
        if is_matrix
    }
    known = sorted({_target(name) for name in matrices})
    unknown = sorted(set(config.targets or ()) - set(known))
    if unknown:
        raise ValueError(
            f"targets={config.targets}: no matrix is called {unknown[0]!r}; choose from "
            f"{', '.join(known)}."
        )
    targets = known if config.targets is None else config.targets
    adapters = {}
    for n, (name, x) in enumerate(matrices.items()):
        if _target(name) in targets:
            *stacked, rows, columns = x.shape
            a = jax.random.normal(jax.random.fold_in(key, n), (*stacked, rows, config.rank))
            b = jnp.zeros((*stacked, config.rank, columns))
            adapters[name] = Adapter(a * rows**-0.5, b)
    return Adapters(adapters, config.alpha / config.rank)


def merged(base: Params | None, trained: Params | Adapters) -> Params:
    """The parameters of a model, of what is trained and what it is added to.

    Args:
      base: what adapters are added to; None: there are none, and the parameters are trained.
      trained: adapters, or parameters.
    """
    if base is None:
        return trained

    def add(path, x):
        adapter = trained.adapters.get(_name(path))
        if adapter is None:
            return x
        return x + (trained.factor * (adapter.a @ adapter.b)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(add, base)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _target(name):
    """layers.0.mixer.query.weight -> query."""
    return name.split(".")[-2]
