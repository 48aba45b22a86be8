"""The instruction on every backend: chunks, one token on blocks of every layout, rings, packing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.blocks import Blocks
from kernels.options import Options
from kernels.write_read import Shared, chunk, decode, read

B, L, S, N, K, H = 2, 3, 24, 4, 2, 32
BACKENDS = ("reference", "xla", "triton_interpret", "triton", "splash_interpret", "splash")
SHARED = Shared()


@pytest.fixture(params=BACKENDS)
def backend(request):
    x = jnp.zeros((1, 2, 1, 32))
    try:
        jax.eval_shape(lambda x: attention(x, x, x, backend=request.param), x)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def expected(block, i, cell, q, window):
    """The block and z, token by token, by the formula over positions."""
    keys, values = map(np.array, block)
    size, z = keys.shape[2], np.zeros(q.shape)
    k, v = cell
    for b, t in np.ndindex(q.shape[:2]):
        p = i[b, t]
        if p < 0:
            continue
        keys[b, :, p % size], values[b, :, p % size] = k[b, t], v[b, t]
        seen = np.arange(0 if window is None else max(0, p - window + 1), p + 1) % size
        for n in range(N):
            head = n // (N // K)
            scores = keys[b, head, seen].astype(np.float64) @ q[b, t, n] / H**0.5
            weights = np.exp(scores - scores.max())
            z[b, t, n] = weights / weights.sum() @ values[b, head, seen]
    return (keys, values), z


def arrays(T, rows=B):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    block = normal(rows, K, S, H), normal(rows, K, S, H)
    cell = normal(rows, T, K, H), normal(rows, T, K, H)
    return block, cell, normal(rows, T, N, H)


def assert_z(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32 sums of some dozen products


# Positions of two rows. A ring of S cells has wrapped around, and does so again within the chunk.
CHUNKS = {
    "start": (None, [[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]),
    "later": (None, [[9, 10, 11, 12, 13], [19, 20, 21, 22, 23]]),
    "shared": (None, [[9, 10, 11, 12, -1]]),
    "padding": (None, [[-1] * 5, [3, 4, 5, 6, -1]]),
    "window": (7, [[9, 10, 11, 12, 13], [2, 3, 4, 5, 6]]),
    "ring": (S, [[S + S - 2, S + S - 1, 2 * S, 2 * S + 1, 2 * S + 2], [0, 1, 2, 3, -1]]),
    "all of the ring": (S, [range(5, 5 + S), range(S)]),
    "more than a ring": (S, [range(5, 9 + S), [*range(S), *[-1] * 4]]),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_chunk_is_written_and_read_like_the_formula(backend, name):
    window, i = CHUNKS[name]
    i = np.array([list(row) for row in i], np.int32)
    block, cell, q = arrays(i.shape[1])
    run = partial(chunk, options=Options(H**-0.5, window), packed=False, backend=backend)
    got, z = jax.jit(run)(block, i, cell, q, SHARED)
    want_block, want = expected(block, np.broadcast_to(i, (B, i.shape[1])), cell, q, window)
    jax.tree.map(np.testing.assert_array_equal, got, want_block)
    assert_z(z, want)


# The second row of each goes on with a document that the block holds already.
PACKED = {
    "all": (None, [[0, 1, 2, 0, 1, 2, 3, -1], [9, 10, 0, 0, 1, 2, -1, -1]]),
    "window": (3, [[0, 1, 2, 3, 4, 0, 1, 2], [4, 5, 6, 7, 8, 9, 0, 1]]),
    "ring": (S, [[0, 1, 0, 1, 2, 0, -1, -1], [S + 2, S + 3, 0, 1, 2, 3, 4, 5]]),
    "one document": (None, [[5, 6, 7, 8, 9, 10, 11, -1], [-1] * 8]),
    "one document in a ring": (S, [[S - 4 + t for t in range(8)], [0, *[-1] * 7]]),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_as_if_run_token_by_token(backend, name):
    window, i = PACKED[name]
    i = np.array(i, np.int32)
    block, cell, q = arrays(i.shape[1])
    run = partial(chunk, options=Options(H**-0.5, window), packed=True, backend=backend)
    got, z = jax.jit(run)(block, i, cell, q, SHARED)
    want_block, want = expected(block, i, cell, q, window)
    assert_z(z, want)
    for b, row in enumerate(i):
        last = row[row >= 0][-1] if (row >= 0).any() else -1
        held = np.arange(max(0, last - S + 1), last + 1) % S
        for x, y in zip(got, want_block, strict=True):
            np.testing.assert_array_equal(x[b][:, held], y[b][:, held])


def test_packed_documents_beyond_the_block_are_not_a_number():
    """The run of cells would end beyond the block: said, since nothing can be raised here."""
    i = np.array([[S - 4, S - 3, S - 2, 0, 1], [S - 5, S - 4, S - 3, 0, 1]], np.int32)
    block, cell, q = arrays(5)
    run = partial(chunk, options=Options(H**-0.5), packed=True, backend="xla")
    _, z = run(block, i, cell, q, SHARED)
    assert np.isnan(z[0]).all()
    assert_z(z[1], expected(block, i, cell, q, None)[1][1])


def test_a_chunk_has_gradients_in_reverse(backend):
    """Of the block before, the new cells and the queries, through the block after and z."""
    block, cell, q = arrays(5)
    i = np.array([[3, 4, 5, 6, 7], [0, 1, 2, -1, -1]], np.int32)

    def gradients(backend, packed):
        def loss(block, cell, q):
            run = partial(chunk, options=Options(H**-0.5), packed=packed, backend=backend)
            after, z = run(block, i, cell, q, SHARED)
            return (z**2).sum() + sum((x**2)[0, :, :8].sum() for x in after)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(block, cell, q)

    for packed in (False, True):
        got, want = gradients(backend, packed), gradients("reference", packed)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, want)  # as for z, squared


LAYOUTS = {"": None, "B": None, "L": 1, "BL": 2}  # axes in front of [K, S, H]: the layer meant


def laid_out(block, layout):
    """Blocks that hold a block [B, K, S, H], and other layers of garbage."""
    layer = LAYOUTS[layout]
    arrays = block if "B" in layout else jax.tree.map(lambda x: x[0], block)
    if layer is not None:
        axis = int("B" in layout)
        arrays = jax.tree.map(
            lambda x: np.stack([x if n == layer else x + n for n in range(L)], axis), arrays
        )
    return Blocks(arrays, None if layer is None else jnp.int32(layer), "B" in layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 7, S], ids=["all", "window", "ring"])
def test_one_token_on_blocks_of_every_layout(backend, layout, window):
    block, cell, q = arrays(1, B if "B" in layout else 1)
    i = np.array([[2 * S + 3 if window == S else 9], [-1]], np.int32)[: len(q)]
    blocks = laid_out(block, layout)
    options = Options(H**-0.5, window)
    want_block, want = expected(block, i, cell, q, window)
    written = jax.tree.map(np.asarray, Blocks(blocks.put(want_block), blocks.layer, blocks.batched))
    run = jax.jit(partial(decode, options=options, backend=backend))
    try:
        got, z = run(blocks, i, cell, q, SHARED)
    except NotImplementedError as error:
        assert "no way of its own to run one token" in str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, got, written.arrays)
        assert_z(z, want)
    again = jax.jit(partial(read, options=options, backend=backend))
    assert_z(again(written, i, q, SHARED), want)


def test_one_position_for_all_sequences():
    block, cell, q = arrays(1)
    i = np.array([[9]], np.int32)
    run = partial(decode, options=Options(H**-0.5), backend="xla")
    got, z = run(laid_out(block, "B"), i, cell, q, SHARED)
    want_block, want = expected(block, np.repeat(i, B, 0), cell, q, None)
    jax.tree.map(np.testing.assert_array_equal, got, want_block)
    assert_z(z, want)


def test_auto_refuses_nothing_that_one_token_needs(monkeypatch):
    """A backend without a way of its own to run one token is passed over, when it may be."""
    monkeypatch.setattr("kernels.backends.choice.AUTO", {"cpu": ("splash_interpret", "xla")})
    block, cell, q = arrays(1)
    run = partial(decode, options=Options(1.0), backend="auto")
    i = np.zeros((1, 1), np.int32)
    jaxpr = str(jax.make_jaxpr(run)(laid_out(block, "B"), i, cell, q, SHARED))
    assert "pallas_call" not in jaxpr
