"""What tests of the whole library share: parameters in which every number matters."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.program.init import init_params


@cache
def _random_params(config, seed=0):
    """Parameters far from their initial zeros and ones, so that every one of them matters."""
    rng = np.random.default_rng(seed)
    params = jax.jit(partial(init_params, config))(jax.random.key(seed))
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.2 * rng.standard_normal(x.shape), x.dtype), params
    )


@pytest.fixture(scope="session")
def random_params():
    """random_params(config, seed=0) makes parameters far from their initial zeros and ones."""
    return _random_params
