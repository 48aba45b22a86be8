"""Any split of the positions into chunks gives the same cache and logits, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import Config
from transformer.modes.schedule import parallel, recompute, run
from transformer.program.init import init_cache
from transformer.program.program import program

# Both modes multiply the same float32 numbers in another order; rounding errors of a few layers
# stay well below this share of the largest number.
TOLERANCE = 2e-5

CONFIG = Config(
    vocab_size=61, max_length=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2,
    window=(6, None),
)  # fmt: skip
LEARNED = CONFIG.replace(positions="learned", max_length=6)
PROGRAM = program(CONFIG)
RUN = jax.jit(run, static_argnums=(0, 5))


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(y).max()
        np.testing.assert_allclose(x, y, atol=TOLERANCE * scale, rtol=0)


@settings(max_examples=3)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_continue_one_another(params, lengths, chunk, seed):
    """Parts of a sequence, one after the other, each with its own schedule."""
    tokens = np.random.default_rng(seed).integers(0, 61, sum(lengths), dtype=np.int32)
    expected = RUN(PROGRAM, params, init_cache(CONFIG, 40), tokens, 0, None)
    cache, start, logits = init_cache(CONFIG, 40), 0, []
    for length in lengths:
        part = tokens[start : start + length]
        cache, part_logits = RUN(PROGRAM, params, cache, part, start, chunk)
        logits.append(part_logits)
        start += length
    assert_close((cache, jnp.concatenate(logits)), expected)


def test_rows_of_a_batch_have_their_own_positions(params, rng):
    tokens = rng.integers(0, 61, (3, 20), dtype=np.int32)
    starts = np.array([0, 3, 9])
    caches, rest = [], []
    for row, start in zip(tokens, starts, strict=True):
        cache = init_cache(CONFIG, 40)
        if start:
            cache, _ = RUN(PROGRAM, params, cache, row[:start], 0, None)
        caches.append(cache)
        rest.append(RUN(PROGRAM, params, cache, row[start : start + 8], start, None))
    batch = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    parts = jnp.stack([row[s : s + 8] for row, s in zip(tokens, starts, strict=True)])
    expected = jax.tree.map(lambda *x: jnp.stack(x), *rest)
    for chunk in (None, 1, 3):
        rows = lambda cache, part, start, chunk=chunk: run(
            PROGRAM, params, cache, part, start, chunk
        )
        actual = jax.jit(jax.vmap(rows))(batch, parts, starts)
        assert_close(actual, expected)


def test_positions_outside_of_sequences_or_inside(params, rng):
    """The axis of positions may be mapped outside of the axis of sequences."""
    tokens = rng.integers(0, 61, (2, 10), dtype=np.int32)
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), init_cache(CONFIG, 10))
    inside = jax.vmap(lambda cache, row: run(PROGRAM, params, cache, row))
    sequences = jax.vmap(PROGRAM, in_axes=(None, 0, 0, None))
    outside = jax.vmap(
        sequences, in_axes=(None, None, 1, 0), out_axes=(None, 1), axis_name="positions"
    )
    actual = jax.jit(outside)(params, caches, tokens, jnp.arange(10))
    assert_close(actual, jax.jit(inside)(caches, tokens))


def test_gradients_of_each_sequence(params, rng):
    """vmap of grad equals grad of each row."""
    tokens = rng.integers(0, 61, (2, 12), dtype=np.int32)
    loss = lambda params, row: jnp.sin(run(PROGRAM, params, init_cache(CONFIG, 12), row)[1]).mean()
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, tokens)
    alone = jax.jit(jax.grad(loss))
    for n, row in enumerate(tokens):
        assert_close(jax.tree.map(lambda x, n=n: x[n], each), alone(params, row))


def test_padding_changes_nothing(params, rng):
    """Tokens at position -1 write nothing and are read by nobody."""
    tokens = rng.integers(0, 61, 20, dtype=np.int32)
    expected = RUN(PROGRAM, params, init_cache(CONFIG, 40), tokens[:9], 0, None)
    chunk = jax.jit(lambda cache, positions: parallel(PROGRAM, params, cache, tokens, positions))
    positions = jnp.where(jnp.arange(20) < 9, jnp.arange(20), -1)
    cache, logits = chunk(init_cache(CONFIG, 40), positions)
    assert_close((cache, logits[:9]), expected)
    again, _ = chunk(cache, jnp.full(20, -1))
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("config", [CONFIG, LEARNED.replace(scan_layers=True, max_length=64)])
def test_packed_documents_are_positions_that_begin_again(config, random_params, rng):
    """Afterwards the cache holds the last document, which goes on one token at a time."""
    f, params, tokens = program(config), random_params(config), rng.integers(0, 61, 14)
    documents = {0: 6, 6: 3, 9: 5}  # where they begin, and their lengths
    positions = np.concatenate([np.arange(n) for n in documents.values()])

    @jax.jit
    def results(params, tokens):
        packed = parallel(f, params, init_cache(config, 20), tokens, positions, packed=True)
        apart = [
            run(f, params, init_cache(config, 20), tokens[begin : begin + length])
            for begin, length in documents.items()
        ]
        goes_on = lambda cache: run(f, params, cache, tokens[:4], start=5, chunk=1)[1]
        logits = jnp.concatenate([logits for _, logits in apart])
        return (packed[1], goes_on(packed[0])), (logits, goes_on(apart[-1][0]))

    assert_close(*results(params, tokens))


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_below_one_is_refused(params, chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk}; it must be at least 1"):
        run(PROGRAM, params, init_cache(CONFIG, 8), np.arange(4), chunk=chunk)


def test_more_tokens_than_cells_are_refused(params):
    with pytest.raises(ValueError, match="need 9 cells, and the cache has 8"):
        run(PROGRAM, params, init_cache(CONFIG, 8), np.arange(4), start=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": -3}, ValueError, "start=-3; it must be at least 0"),
        ({"start": 2.0}, TypeError, "start=2.0 is of type float; it must be a whole number"),
        ({"start": "1"}, TypeError, "start='1' is of type str; it must be a whole number"),
        ({"chunk": 1.5}, TypeError, "chunk=1.5 is of type float; it must be a whole number"),
    ],
)
def test_positions_that_do_not_exist_are_refused(params, options, error, message):
    with pytest.raises(error, match=message):
        run(PROGRAM, params, init_cache(CONFIG, 8), np.arange(4), **options)


def test_more_tokens_than_learned_positions_are_refused(random_params):
    with pytest.raises(
        ValueError, match="need 7 learned positions, and the model has max_length=6"
    ):
        params = random_params(LEARNED)
        run(program(LEARNED), params, init_cache(LEARNED, 8), np.arange(4), start=3)


@pytest.mark.parametrize("mode", [run, recompute])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0, 61], ValueError, "token id 61 at 1 is outside of the vocabulary, 0 to 60"),
        ([2**32 + 5], ValueError, "token id 4294967301 at 0"),  # 5 in 32 bits
        ([3, -1], ValueError, "token id -1 at 1"),
        ([True, False], TypeError, "tokens must be integers, and hold bool"),
        ([1.0, 2.0], TypeError, "tokens must be integers, and hold float"),
        ([], ValueError, "at least one token"),
        ([[1, 2]], ValueError, "use jax.vmap for a batch"),
    ],
)
def test_tokens_that_do_not_exist_are_refused(params, mode, tokens, error, message):
    with pytest.raises(error, match=message):
        mode(PROGRAM, params, init_cache(CONFIG, 8), np.array(tokens))


@pytest.mark.parametrize("chunk", [None, 1])
def test_lists_numpy_and_their_numbers_are_taken(params, chunk):
    given = [4, 5, 6]
    expected = RUN(PROGRAM, params, init_cache(CONFIG, 8), jnp.array(given), 1, chunk)
    numpy = jax.tree.map(np.asarray, params)
    options = {"start": np.int64(1), "chunk": chunk and np.int32(chunk)}
    actual = jax.jit(lambda: run(PROGRAM, numpy, init_cache(CONFIG, 8), given, **options))()
    assert_close(actual, expected)


def test_what_compiled_code_cannot_refuse_is_nan(random_params):
    config = LEARNED.replace(max_length=3)
    f, params = program(config), random_params(config)
    for token in (-1, 61):
        tokens = np.array([5, token, 5])
        logits = RUN(f, params, init_cache(config, 4), tokens, 0, 1)[1]
        assert np.isfinite(logits[0]).all() and np.isnan(logits[1:]).all()
    logits = RUN(f, params, init_cache(config, 4), np.arange(3), 1, 1)[1]
    assert np.isfinite(logits[:2]).all() and np.isnan(logits[2]).all()


def test_recomputing_every_prefix_gives_the_same_logits(params, rng):
    tokens = rng.integers(0, 61, 9)
    cache = init_cache(CONFIG, 9)
    given, logits = jax.jit(lambda: recompute(PROGRAM, params, cache, tokens))()
    assert_close(logits, RUN(PROGRAM, params, cache, tokens, 0, None)[1])
    jax.tree.map(np.testing.assert_array_equal, given, cache)
