"""The instruction on every backend: chunks, packed documents, one token on blocks as they lie."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention
from kernels.blocks import Blocks
from kernels.options import Options
from kernels.write_read import Shared, chunk, decode, read

S, N, K, H, HV = 24, 4, 2, 32, 32
BACKENDS = ("reference", "xla", "triton_interpret", "triton", "splash_interpret", "splash")
IN_PLACE = ("xla", "triton_interpret", "triton")  # those with a way of their own to run one token


@pytest.fixture(params=BACKENDS)
def backend(request):
    x = jnp.zeros((1, 2, 1, 32))
    try:
        jax.eval_shape(lambda x: attention(x, x, x, backend=request.param), x)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def operands(rng, B, T):
    """A block, new cells, queries, and what they share."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    block = normal(B, K, S, H), normal(B, K, S, HV)
    cell = normal(B, T, K, H), normal(B, T, K, HV)
    return block, cell, normal(B, T, N, H), Shared(normal(N), np.float32([0.5, 0.1, 0.3, 0.2]))


def expected(block, i, cell, q, shared, window):
    """The block and z, one token after the other, by the formula over positions."""
    keys, values = map(np.array, block)
    size, z = keys.shape[2], np.zeros((*q.shape[:3], HV))
    (k, v), i = cell, np.broadcast_to(i, q.shape[:2])
    for b, t in np.ndindex(q.shape[:2]):
        p = i[b, t]
        if p < 0:
            continue
        keys[b, :, p % size], values[b, :, p % size] = k[b, t], v[b, t]
        seen = np.arange(0 if window is None else max(0, p - window + 1), p + 1)
        for n in range(N):
            head = n // (N // K)
            scores = keys[b, head, seen % size].astype(np.float64) @ q[b, t, n] / H**0.5
            if shared.alibi is not None:
                scores -= shared.alibi[n] * (p - seen)
            weights, total = np.exp(scores), np.exp(scores).sum()
            if shared.sinks is not None:
                total += np.exp(shared.sinks[n])
            z[b, t, n] = weights / total @ values[b, head, seen % size]
    return (keys, values), z


def assert_z(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32 sums of some dozen products


def rows(*starts, T):
    """Positions that go on from each start, each row with one more token of padding at its end."""
    i = np.array([np.arange(start, start + T) for start in starts], np.int32)
    for b, row in enumerate(i):
        row[T - b :] = -1
    return i


@pytest.mark.parametrize("window", [None, 7, S], ids=["all", "window", "ring"])
@pytest.mark.parametrize("T", [5, S])
def test_a_chunk_is_written_and_read_like_the_formula(backend, rng, window, T):
    i = rows(0, 9 if T < S else 0, 0, S - T, T=T)
    if window == S:  # it has wrapped around, and does so again within the chunk
        i = rows(2 * S - 2, 0, 3, S - T // 2, T=T)
    block, cell, q, shared = operands(rng, len(i), T)
    if "splash" in backend:
        shared = Shared(shared.sinks)
    run = partial(chunk, options=Options(H**-0.5, window), packed=False, backend=backend)
    got, z = jax.jit(run)(block, i, cell, q, shared)
    want_block, want = expected(block, i, cell, q, shared, window)
    jax.tree.map(np.testing.assert_array_equal, got, want_block)
    assert_z(z, want)


@pytest.mark.parametrize("window", [None, S], ids=["all", "ring"])
def test_a_chunk_of_one_row_of_positions_for_all(rng, window):
    i = rows(11, T=5)
    block, cell, q, shared = operands(rng, 2, 5)
    run = partial(chunk, options=Options(H**-0.5, window), packed=False, backend="xla")
    got, z = jax.jit(run)(block, i, cell, q, shared)
    want_block, want = expected(block, i, cell, q, shared, window)
    jax.tree.map(np.testing.assert_array_equal, got, want_block)
    assert_z(z, want)


def test_a_ring_takes_a_chunk_longer_than_itself(rng):
    i = rows(5, 0, T=S + 4)
    block, cell, q, shared = operands(rng, 2, S + 4)
    run = partial(chunk, options=Options(H**-0.5, S), packed=False, backend="xla")
    got, z = jax.jit(run)(block, i, cell, q, shared)
    want_block, want = expected(block, i, cell, q, shared, S)
    jax.tree.map(np.testing.assert_array_equal, got, want_block)
    assert_z(z, want)


# Some rows go on with a document that the block holds already.
PACKED = [
    [0, 1, 2, 0, 1, 2, 3, -1],
    [9, 10, 0, 0, 1, 2, -1, -1],
    [4, 5, 6, 7, 8, 9, 0, 1],
    [5, 6, 7, 8, 9, 10, 11, -1],
    [-1] * 8,
    [0, *[-1] * 7],
]
PACKED_IN_A_RING = [
    [S + 2, S + 3, 0, 1, 2, 3, 4, 5],
    [S - 4, S - 3, S - 2, S - 1, S, S + 1, S + 2, S + 3],
    [3 * S, 0, 1, 0, 1, 2, -1, -1],
]


@pytest.mark.parametrize("window", [None, 3, S], ids=["all", "window", "ring"])
def test_packed_documents_are_as_if_run_token_by_token(backend, rng, window):
    i = np.array(PACKED + (PACKED_IN_A_RING if window == S else []), np.int32)
    block, cell, q, _ = operands(rng, *i.shape)
    run = partial(chunk, options=Options(H**-0.5, window), packed=True, backend=backend)
    got, z = jax.jit(run)(block, i, cell, q, Shared())
    want_block, want = expected(block, i, cell, q, Shared(), window)
    assert_z(z, want)
    for b, row in enumerate(i):
        last = row[row >= 0].tolist()[-1:] or [-1]
        held = np.arange(max(0, last[0] - S + 1), last[0] + 1) % S
        for x, y in zip(got, want_block, strict=True):
            np.testing.assert_array_equal(x[b][:, held], y[b][:, held])


def test_packed_documents_that_run_beyond_the_block_are_not_a_number(rng):
    """What is computed cannot raise an error, and must not be wrong in silence."""
    i = np.array([[S - 4, S - 3, S - 2, 0, 1], [S - 5, S - 4, S - 3, 0, 1]], np.int32)
    block, cell, q, _ = operands(rng, 2, 5)
    run = partial(chunk, options=Options(H**-0.5), packed=True, backend="xla")
    _, z = jax.jit(run)(block, i, cell, q, Shared())
    assert np.isnan(z[0]).all()
    assert_z(z[1], expected(block, i, cell, q, Shared(), None)[1][1])


def test_a_chunk_must_fit_the_block(rng):
    block, cell, q, shared = operands(rng, 1, S + 1)
    run = partial(chunk, options=Options(H**-0.5), packed=False, backend="xla")
    with pytest.raises(ValueError, match=f"a chunk of {S + 1} tokens does not fit a block of {S}"):
        run(block, rows(0, T=S + 1), cell, q, shared)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_a_chunk(backend, rng, packed):
    """Of the block before, the new cells and the queries, through the block after and z."""
    block, cell, q, _ = operands(rng, 2, 5)
    i = np.array([[3, 4, 5, 6, 7], [0, 1, 2, -1, -1]], np.int32)

    def gradients(backend):
        def loss(block, cell, q):
            run = partial(chunk, options=Options(H**-0.5), packed=packed, backend=backend)
            after, z = run(block, i, cell, q, Shared())
            return jnp.sin(z).sum() + sum(jnp.sin(x[0, :, :8]).sum() for x in after)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(block, cell, q)

    jax.tree.map(assert_z, gradients(backend), gradients("reference"))


def test_a_chunk_in_forward_mode(rng):
    block, cell, q, shared = operands(rng, 2, 5)
    i = rows(3, 0, T=5)
    moving = block, cell, q

    def tangents(backend):
        def run(block, cell, q):
            options = Options(H**-0.5)
            return chunk(block, i, cell, q, shared, options=options, packed=False, backend=backend)

        return jax.jit(lambda: jax.jvp(run, moving, jax.tree.map(np.cos, moving))[1])()

    jax.tree.map(assert_z, tangents("xla"), tangents("reference"))


LAYOUTS = {"": None, "B": None, "L": 1, "BL": 2}  # axes in front of [K, S, H]: the layer meant


def laid_out(block, layout):
    """Blocks that hold a block [B, K, S, H], and other layers of other numbers."""
    layer = LAYOUTS[layout]
    arrays = block if "B" in layout else jax.tree.map(lambda x: x[0], block)
    if layer is not None:
        layers = lambda x: np.stack([x if n == layer else x + n for n in range(3)], "B" in layout)
        arrays = jax.tree.map(layers, arrays)
    return Blocks(arrays, None if layer is None else jnp.int32(layer), "B" in layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, S], ids=["all", "ring"])
def test_one_token_on_blocks_as_they_lie(backend, rng, layout, window):
    if backend not in IN_PLACE and layout != "BL":
        pytest.skip("blocks do not meet it as they lie")
    i = np.array([[2 * S + 3 if window == S else 9], [-1], [S - 1]], np.int32)
    i = i if "B" in layout else i[:1]
    block, cell, q, shared = operands(rng, len(i), 1)
    shared = shared if backend in IN_PLACE else Shared()
    blocks, options = laid_out(block, layout), Options(H**-0.5, window)
    want_block, want = expected(block, i, cell, q, shared, window)
    want_arrays = blocks.put(want_block)
    if backend in IN_PLACE:
        run = jax.jit(partial(decode, options=options, backend=backend))
        got, z = run(blocks, i, cell, q, shared)
        jax.tree.map(np.testing.assert_array_equal, got, want_arrays)
        assert_z(z, want)
    again = jax.jit(partial(read, options=options, backend=backend))
    written = Blocks(want_arrays, blocks.layer, blocks.batched)
    assert_z(again(written, i, q, shared), want)


def test_one_position_for_all_sequences(rng):
    block, cell, q, shared = operands(rng, 2, 1)
    i = np.array([[9]], np.int32)
    run = partial(decode, options=Options(H**-0.5), backend="xla")
    got, z = run(laid_out(block, "B"), i, cell, q, shared)
    want_block, want = expected(block, i, cell, q, shared, None)
    jax.tree.map(np.testing.assert_array_equal, got, want_block)
    assert_z(z, want)


@pytest.mark.parametrize("name", ["reference", "splash_interpret"])
def test_a_backend_without_a_way_to_run_one_token_says_so(rng, name):
    block, cell, q, _ = operands(rng, 1, 1)
    run = partial(decode, options=Options(1.0), backend=name)
    with pytest.raises(NotImplementedError, match="no way of its own to run one token"):
        run(laid_out(block, "B"), np.zeros((1, 1), np.int32), cell, q, Shared())


def test_auto_passes_over_a_backend_without_a_way_to_run_one_token(rng, monkeypatch):
    monkeypatch.setattr("kernels.backends.choice.AUTO", {"cpu": ("splash_interpret", "xla")})
    block, cell, q, _ = operands(rng, 1, 1)
    run = partial(decode, options=Options(1.0), backend="auto")
    i = np.zeros((1, 1), np.int32)
    jaxpr = str(jax.make_jaxpr(run)(laid_out(block, "B"), i, cell, q, Shared()))
    assert "pallas_call" not in jaxpr


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_under_x64(rng, dtype):
    """Positions stay int32, and float32 stays float32."""
    block, cell, q, shared = jax.tree.map(lambda x: x.astype(dtype), operands(rng, 1, 5))
    i = rows(S - 2, T=5)
    one = lambda tree: jax.tree.map(lambda x: x[:, :1], tree)
    options = {"options": Options(H**-0.5, S), "backend": "xla"}
    with jax.enable_x64(True):
        block, z = jax.jit(partial(chunk, **options, packed=True))(block, i, cell, q, shared)
        step = jax.jit(partial(decode, **options))
        results = step(Blocks(block, batched=True), i[:, :1] + 5, one(cell), one(q), shared)
    assert {x.dtype.name for x in jax.tree.leaves((block, z, results))} == {dtype}
