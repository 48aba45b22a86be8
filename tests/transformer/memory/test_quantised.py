"""Attention with cells in int8: a quarter of the memory, nearly the same logits, in all modes.

That it is lawful is shown for all memories in test_memory.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import Config, Softmax, init_cache, program, run
from transformer.memory.quantised import QuantisedSoftmax

CONFIG = Config(
    vocab_size=64,
    max_length=96,
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    window=(16, None),
)
KEPT = CONFIG.replace(cache_dtype="int8")


def test_it_takes_less_memory_and_gives_nearly_the_same_logits(random_params, rng):
    params = random_params(CONFIG)
    tokens = rng.integers(0, CONFIG.vocab_size, 80, dtype=np.int32)

    @jax.jit
    def results(params, tokens):
        cache, exact = run(program(CONFIG), params, init_cache(CONFIG, 96), tokens)
        f, empty = program(KEPT), init_cache(KEPT, 96)
        ways = [run(f, params, empty, tokens, chunk=chunk) for chunk in (None, 1)]
        return cache, exact, ways

    cache, exact, ways = results(params, tokens)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    off = lambda x, y: np.sqrt(np.mean(np.square(x - y))) / np.std(exact)
    for kept, logits in ways:
        # 16 numbers of a head and one scale, 20 bytes, where float32 takes 64.
        assert size(kept) == size(cache) * 20 / 64
        # A number is off by at most 0.4 % of the largest of its head, in each of 2 layers.
        assert 0 < off(logits, exact) < 0.05
        # float32 in another order may round a few numbers of a cell to the next step.
        assert off(logits, ways[0][1]) < 0.02


def test_exact_numerics_read_the_same_bits_in_all_modes(random_params, rng):
    params = random_params(KEPT)
    tokens = rng.integers(0, KEPT.vocab_size, 24, dtype=np.int32)
    f = program(KEPT, numerics="exact")
    way = lambda chunk: jax.jit(lambda *x: run(f, *x, chunk=chunk)[1])
    parallel, sequential = (way(n)(params, init_cache(KEPT, 32), tokens) for n in (None, 1))
    np.testing.assert_array_equal(parallel, sequential)


def test_what_cannot_be_is_refused(random_params):
    with pytest.raises(NotImplementedError, match="'triton' does not read cells in int8"):
        QuantisedSoftmax(Softmax(backend="triton"))
    with pytest.raises(ValueError, match="is for layers of attention, and there are none"):
        CONFIG.replace(window=None, layer_kinds="delta", cache_dtype="int8")
    with pytest.raises(ValueError, match="cache_dtype='int4' does not exist; choose one of None"):
        CONFIG.replace(cache_dtype="int4")

    def loss(params):
        return run(program(KEPT), params, init_cache(KEPT, 8), jnp.arange(8))[1].sum()

    with pytest.raises(NotImplementedError, match="to train, take a config with cache_dtype=None"):
        jax.grad(loss)(random_params(KEPT))
