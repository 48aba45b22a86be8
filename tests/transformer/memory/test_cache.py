"""The rules of the cache: each block once, in order, and errors that say so while tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.memory.cache import Cache, ProgramError
from transformer.modes.schedule import run
from transformer.presets import presets
from transformer.program.program import init_cache, init_params, program

CONFIG = presets["tiny"].replace(num_layers=3)
K, N, H = CONFIG.num_kv_heads, CONFIG.num_heads, CONFIG.head_size


def calling(times, end=True):
    """A program that calls the instruction so many times."""

    def f(params, cache, token, i):
        cache = cache.begin()
        for _ in range(times):
            cache, _ = cache.write_read(i, jnp.ones((K, H)), jnp.ones((K, H)), jnp.ones((N, H)))
        return cache.end() if end else cache, jnp.zeros(CONFIG.vocab_size)

    return f


@pytest.mark.parametrize("chunk", [None, 1])
def test_calling_too_seldom_names_the_block(chunk):
    with pytest.raises(ProgramError, match=r"ended after 2 of 3 blocks.*block 2.*exactly once"):
        jax.eval_shape(
            lambda: run(calling(2), None, init_cache(CONFIG, 8), np.arange(4), chunk=chunk)
        )


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (calling(2, end=False), r"returned a cache at block 2 of 3; end the token"),
        (lambda params, cache, *_: (cache, jnp.zeros(9)), r"block 0 is as it was.*exactly once"),
    ],
    ids=["without end", "without the cache"],
)
def test_a_token_that_does_not_end_is_refused(f, message, chunk):
    with pytest.raises(ProgramError, match=message):
        jax.eval_shape(lambda: run(f, None, init_cache(CONFIG, 8), np.arange(4), chunk=chunk))


@pytest.mark.parametrize("chunk", [None, 1])
def test_calling_too_often_names_the_call(chunk):
    with pytest.raises(ProgramError, match=r"called a 4th time.*has 3 blocks.*exactly once"):
        jax.eval_shape(
            lambda: run(calling(4), None, init_cache(CONFIG, 8), np.arange(4), chunk=chunk)
        )


def test_a_token_must_begin_and_end():
    cache = init_cache(CONFIG, 8)
    with pytest.raises(ProgramError, match=r"call cache.begin"):
        cache.write_read(0, jnp.ones((K, H)), jnp.ones((K, H)), jnp.ones((N, H)))
    with pytest.raises(ProgramError, match=r"without cache.begin"):
        cache.end()
    cache, _ = calling(1, end=False)(None, cache, 0, 0)
    with pytest.raises(ProgramError, match=r"begins while another is at block 1 of 3"):
        cache.begin()


@pytest.mark.parametrize(
    "k, v, q",
    [((K + 1, H), (K + 1, H), (N, H)), ((K, H), (K, H + 1), (N, H)), ((K, H), (K, H), (K + 1, H))],
)
def test_cells_that_do_not_fit_are_refused(k, v, q):
    cache = init_cache(CONFIG, 8).begin()
    with pytest.raises(ValueError, match=rf"block 0 holds cells \[K={K}, H={H}\]"):
        cache.write_read(0, jnp.ones(k), jnp.ones(v), jnp.ones(q))


def test_a_cache_is_not_changed_by_what_reads_it():
    cache = init_cache(CONFIG, 8)
    params = init_params(CONFIG, jax.random.key(0))
    before = jax.tree.map(np.array, cache)
    after, _ = jax.jit(lambda cache: run(program(CONFIG), params, cache, np.arange(4)))(cache)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, cache), before)
    assert isinstance(after, Cache)
    assert np.any(np.asarray(after.blocks[0].keys) != 0)


def test_a_window_bounds_its_blocks():
    cache = init_cache(CONFIG.replace(window=(5, None, 100)), 20)
    assert [block.keys.shape[1] for block in cache.blocks] == [5, 20, 20]


def test_capacity_below_one_is_refused():
    with pytest.raises(ValueError, match="capacity=0"):
        init_cache(CONFIG, 0)


def test_mapping_a_shared_operand_is_refused():
    """Sinks are one set for all sequences; several models need a loop."""
    config = CONFIG.replace(attention_sinks=True)
    params = jax.vmap(lambda key: init_params(config, key))(jax.random.split(jax.random.key(0)))
    each = lambda params: run(program(config), params, init_cache(config, 4), np.arange(4))
    with pytest.raises(NotImplementedError, match=r"operand 'sinks'.*jax.lax.map"):
        jax.vmap(each)(params)
    _, logits = jax.lax.map(each, params)
    assert logits.shape == (2, 4, config.vocab_size)
