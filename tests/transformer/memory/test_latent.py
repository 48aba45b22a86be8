"""Latent attention: it is attention over keys and values made from the latent vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.memory.cache import Cache
from transformer.memory.latent import Latent
from transformer.memory.softmax import Softmax
from transformer.modes.schedule import parallel

T, N, R, P, H, HV = 12, 3, 5, 2, 4, 6


def run(memory, cells, queries, shared, chunk):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), cells)

    def f(shared, cache, token, i):
        turn, z = cache.begin(i).write_read(memory, *token, shared)
        return turn.end(), z

    @jax.jit
    def results(cells, queries, shared):
        cache, z = Cache.empty(T, [(memory, shapes)]), []
        for begin in range(0, T, chunk):
            i = jnp.arange(begin, begin + chunk, dtype=jnp.int32)
            tokens = jax.tree.map(lambda x, i=i: x[i], (cells, queries))
            cache, one = parallel(f, shared, cache, tokens, i)
            z.append(one)
        return jnp.concatenate(z)

    return results(cells, queries, shared)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("chunk", [T, 4, 1], ids=["made", "absorbed", "in place"])
def test_it_is_attention_over_what_the_latent_vectors_make(chunk, soft_cap, rng):
    assert 2 * 4 <= H + HV < 2 * T  # so that chunks of 4 absorb the matrices, and of T do not
    with jax.enable_x64(True):
        latent, position = rng.standard_normal((T, R)), rng.standard_normal((T, P))
        q, q_position = rng.standard_normal((T, N, H)), rng.standard_normal((T, N, P))
        key, value = rng.standard_normal((R, N, H)), rng.standard_normal((R, N, HV))
        cells, queries = np.concatenate([latent, position], 1), (q, q_position)
        z = run(Latent(R, soft_cap=soft_cap), cells, queries, (key, value), chunk)
        keys = np.concatenate(
            [np.einsum("tr,rnh->tnh", latent, key), np.repeat(position[:, None], N, 1)], 2
        )
        values = np.einsum("tr,rnh->tnh", latent, value)
        both = np.concatenate(queries, 2)
        expected = run(Softmax(soft_cap=soft_cap), (keys, values), both, None, T)
        # float64: sums of tens of terms, in another order.
        np.testing.assert_allclose(z, expected, atol=1e-11)


def test_a_cell_holds_one_vector_for_all_heads():
    block = Latent(R).empty(8, jax.ShapeDtypeStruct((R + P,), jnp.bfloat16))
    assert block.shape == (1, 8, R + P) and block.dtype == jnp.bfloat16
