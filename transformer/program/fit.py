"""Whether parameters belong to an architecture."""

import functools

import jax
import jax.numpy as jnp

from transformer.config import Config
from transformer.numerics.matrix import is_matrix
from transformer.program.init import init_params
from transformer.program.params import Params

_SHOWN = 3  # differences that a message names


def check_params(config: Config, params: Params) -> None:
    """Refuses parameters that are not those of the config, in their structure or their shapes.

    Raises:
      TypeError: params are not `Params`.
      ValueError: names the first differences.
    """
    if not isinstance(params, Params):
        raise TypeError(
            f"the parameters are of type {type(params).__name__}; a program made from a config "
            "takes the Params that init_params(config, key) or load(path) give."
        )
    expected, given = param_shapes(config), _shapes(params)
    differences = [
        f"{name} is {_said(given.get(name), 'missing')}, and "
        f"{_said(expected.get(name), 'none')} is wanted"
        for name in {**expected, **given}
        if not _agree(given.get(name), expected.get(name))
    ]
    if differences:
        more = len(differences) - _SHOWN
        raise ValueError(
            "the parameters do not belong to this config: "
            + "; ".join(differences[:_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
            + ". Use the config that they were made with."
        )


@functools.lru_cache(maxsize=64)
def abstract_params(config: Config) -> Params:
    """A config's parameters, with a `jax.ShapeDtypeStruct` for each array."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.lru_cache(maxsize=64)
def param_shapes(config: Config) -> dict:
    """The arrays of `abstract_params` by their paths."""
    return _shapes(abstract_params(config))


def _shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_matrix)
    of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_matrix(x) else x
    return {jax.tree_util.keystr(path).lstrip("."): of(x) for path, x in leaves}


def _agree(given, expected):
    if given is None or expected is None:
        return False
    floating = jnp.issubdtype(jnp.result_type(given), jnp.floating)
    return jnp.shape(given) == jnp.shape(expected) and floating


def _said(x, otherwise):
    return otherwise if x is None else f"{jnp.result_type(x)}{list(jnp.shape(x))}"
