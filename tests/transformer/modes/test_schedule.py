"""Any split into chunks gives the same cache and logits, for every kind of transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.suites.equivalence import compare
from transformer.config import Config, RotaryScaling
from transformer.modes.schedule import check_tokens, recompute, run
from transformer.program.program import init_cache, init_params, program

# Both modes multiply the same float32 numbers in another order; rounding errors of a few layers
# stay well below this share of the largest logit.
TOLERANCE = 2e-5

SCALINGS = [None, *(RotaryScaling(kind, 4.0, 16) for kind in RotaryScaling.KINDS)]


@st.composite
def configs(draw):
    pick = lambda *values: draw(st.sampled_from(values))
    num_heads = pick(2, 4)
    placement = pick("pre", "post", "both")
    window = pick(None, 3, 8, (8, None), (4, 8))
    return Config(
        vocab_size=61,
        max_length=64,
        num_layers=2,
        width=32,
        num_heads=num_heads,
        num_kv_heads=pick(1, 2),
        head_size=pick(8, 12),
        feed_forward_width=48,
        positions=pick("rotary", "rotary", "learned", "alibi", "none"),
        rotary_fraction=pick(1.0, 0.5),
        rotary_scaling=pick(*SCALINGS),
        rotary_window_base=pick(None, 100.0),
        norm=pick("rms", "layer"),
        norm_placement=placement,
        feed_forward=pick("gelu", "swiglu", "geglu"),
        biases=pick("none", "qkv", "all"),
        qk_norm=pick(True, False),
        window=window,
        attention_scale=pick(None, 0.2),
        attention_soft_cap=pick(None, 5.0),
        logit_soft_cap=pick(None, 10.0),
        attention_sinks=pick(True, False),
        parallel_residual=placement == "pre" and pick(True, False),
        tie_embeddings=pick(True, False),
        embedding_scale=pick(1.0, 5.0),
        num_experts=pick(0, 0, 4),
        scan_layers=pick(True, False),
        remat=pick("none", "segments", "dots"),
    )


def random_params(config, seed):
    """Parameters far from their initial zeros and ones, so that every one of them matters."""
    params = init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@settings(max_examples=6)
@given(
    configs(),
    st.sampled_from(["chunks of 16", "chunks of 64", "batched", "larger capacity", "recompute"]),
    st.sampled_from([2, 17, 40, 64]),
    st.integers(0, 2**31 - 2),
)
def test_every_way_to_run_agrees(config, way, length, seed):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length, dtype=np.int32)
    params, names = random_params(config, seed), ("parallel", "sequential", way)
    for row in compare(config, params, tokens, names=names):
        assert row.logit_difference <= TOLERANCE, row
        assert (row.gradient_difference or 0) <= TOLERANCE, row


CONFIG = Config(
    vocab_size=61, max_length=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2,
    window=(6, None),
)  # fmt: skip
PROGRAM = program(CONFIG)
PARAMS = random_params(CONFIG, 0)
RUN = jax.jit(
    lambda params, cache, tokens, start, chunk: run(PROGRAM, params, cache, tokens, start, chunk),
    static_argnums=4,
)


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(y).max()
        np.testing.assert_allclose(x, y, atol=TOLERANCE * scale, rtol=0)


@settings(max_examples=5)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([None, 1, 4]))
def test_runs_continue_one_another(lengths, chunk):
    """Parts of a sequence, one after the other, each with its own schedule."""
    tokens = np.random.default_rng().integers(0, 61, sum(lengths), dtype=np.int32)
    expected = RUN(PARAMS, init_cache(CONFIG, 40), tokens, 0, None)
    cache, start, logits = init_cache(CONFIG, 40), 0, []
    for length in lengths:
        part = tokens[start : start + length]
        cache, part_logits = RUN(PARAMS, cache, part, start, chunk)
        logits.append(part_logits)
        start += length
    assert_close((cache, jnp.concatenate(logits)), expected)


def test_rows_of_a_batch_have_their_own_positions():
    tokens = np.random.default_rng().integers(0, 61, (3, 20), dtype=np.int32)
    starts = np.array([0, 3, 9])
    caches, rest = [], []
    for row, start in zip(tokens, starts, strict=True):
        cache = init_cache(CONFIG, 40)
        if start:
            cache, _ = RUN(PARAMS, cache, row[:start], 0, None)
        caches.append(cache)
        rest.append(RUN(PARAMS, cache, row[start : start + 8], start, None))
    batch = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    parts = jnp.stack([row[s : s + 8] for row, s in zip(tokens, starts, strict=True)])
    expected = jax.tree.map(lambda *x: jnp.stack(x), *rest)
    for chunk in (None, 1, 3):
        rows = lambda cache, part, start, chunk=chunk: run(
            PROGRAM, PARAMS, cache, part, start, chunk
        )
        actual = jax.jit(jax.vmap(rows))(batch, parts, starts)
        assert_close(actual, expected)


def test_positions_outside_of_sequences_or_inside():
    """The axis of positions may be mapped outside of the axis of sequences."""
    tokens = np.random.default_rng().integers(0, 61, (2, 10), dtype=np.int32)
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), init_cache(CONFIG, 10))
    inside = jax.vmap(lambda cache, row: run(PROGRAM, PARAMS, cache, row))
    sequences = jax.vmap(PROGRAM, in_axes=(None, 0, 0, None))
    outside = jax.vmap(sequences, in_axes=(None, None, 1, 0), out_axes=(None, 1))
    actual = jax.jit(outside)(PARAMS, caches, tokens, jnp.arange(10))
    assert_close(actual, jax.jit(inside)(caches, tokens))


def test_gradients_of_each_sequence():
    """vmap of grad equals grad of each row."""
    tokens = np.random.default_rng().integers(0, 61, (2, 12), dtype=np.int32)
    loss = lambda params, row: jnp.sin(run(PROGRAM, params, init_cache(CONFIG, 12), row)[1]).mean()
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(PARAMS, tokens)
    for n, row in enumerate(tokens):
        expected = jax.jit(jax.grad(loss))(PARAMS, row)
        assert_close(jax.tree.map(lambda x, n=n: x[n], each), expected)


def test_padding_changes_nothing():
    """Tokens at position -1 write nothing and are read by nobody."""
    from transformer.modes.schedule import parallel

    tokens = np.random.default_rng().integers(0, 61, 20, dtype=np.int32)
    expected = RUN(PARAMS, init_cache(CONFIG, 40), tokens[:9], 0, None)
    positions = jnp.where(jnp.arange(20) < 9, jnp.arange(20), -1)
    cache, logits = jax.jit(lambda: parallel(
        PROGRAM, PARAMS, init_cache(CONFIG, 40), tokens, positions
    ))()  # fmt: skip
    assert_close((cache, logits[:9]), expected)
    nothing = jnp.full(20, -1)
    again, _ = jax.jit(lambda c: parallel(PROGRAM, PARAMS, c, tokens, nothing))(cache)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_below_one_is_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk}; a chunk is at least 1"):
        run(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.arange(4), chunk=chunk)


def test_more_tokens_than_cells_are_refused():
    with pytest.raises(ValueError, match="need 9 cells, and the cache has 8"):
        run(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.arange(4), start=5)


def test_positions_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="start=-3; positions begin at 0"):
        run(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.arange(4), start=-3)
    with pytest.raises(TypeError, match="float"):
        run(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.arange(4), start=2.0)
    learned = CONFIG.replace(positions="learned", max_length=6)
    params = init_params(learned, jax.random.key(0))
    with pytest.raises(
        ValueError, match="need 7 learned positions, and the model has max_length=6"
    ):
        run(program(learned), params, init_cache(learned, 8), np.arange(4), start=3)


@pytest.mark.parametrize("mode", [run, recompute])
def test_tokens_out_of_range_are_refused(mode):
    with pytest.raises(ValueError, match="token id 61 at 1 is outside of the vocabulary, 0 to 60"):
        mode(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.array([0, 61]))
    with pytest.raises(ValueError, match="token id 4294967301 at 0"):  # 5 in 32 bits
        mode(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.array([2**32 + 5]))
    for kind in (bool, float):
        with pytest.raises(TypeError, match=f"tokens are integers, and hold {kind.__name__}"):
            mode(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.ones(2, kind))
    with pytest.raises(ValueError, match="token id -1 at 0, 2"):
        check_tokens(np.array([[0, 3, -1]]), 61)


def test_what_compiled_code_cannot_refuse_is_nan():
    learned = CONFIG.replace(positions="learned", max_length=3)
    params = init_params(learned, jax.random.key(0))
    modes = jax.jit(run, static_argnums=(0, 5))
    for token in (-1, 61):
        tokens = np.array([5, token, 5])
        logits = modes(program(learned), params, init_cache(learned, 4), tokens, 0, 1)[1]
        assert np.isfinite(logits[0]).all() and np.isnan(logits[1:]).all()
    logits = modes(program(learned), params, init_cache(learned, 4), np.arange(3), 1, 1)[1]
    assert np.isfinite(logits[:2]).all() and np.isnan(logits[2]).all()


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        run(PROGRAM, PARAMS, init_cache(CONFIG, 8), np.zeros(0, np.int32))
