"""Arrays that lie on eight devices, under jit and shard_map: each computes its part, as one would.

Nothing is gathered.
"""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from kernels import attention

# The number of devices is fixed when JAX starts, so eight of them take a process of their own.
PROGRAM = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from kernels import attention
    from kernels.blocks import Blocks
    from kernels.options import Options
    from kernels.write_read import Shared, decode

    jax.config.update("jax_default_matmul_precision", "highest")
    backend, cells, *ways = sys.argv[1:]
    B, T, N, K, H, S = 8, 20, 4, 2, 32, int(cells)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))

    def attend(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, window=9, backend=backend)

    def outputs_and_gradients(attend):
        def loss(*arrays):
            z = attend(*arrays)
            return (z * jnp.cos(jnp.arange(z.size)).reshape(z.shape)).sum(), z

        def of(*arrays):
            gradients, z = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
            return *gradients, z

        return of

    def step(q, k, v, keys, values, i):
        blocks = Blocks((keys, values), batched=True)
        operands = blocks, i, (k[:, :1], v[:, :1]), q[:, :1], Shared()
        (keys, values), z = decode(*operands, options=Options(0.3), backend=backend)
        return keys, values, z

    def compare(want, split, arrays, specs, result_specs):
        arrays = [put(x, spec) for x, spec in zip(arrays, specs, strict=True)]
        program = jax.jit(split).lower(*arrays).compile()
        text = program.as_text()
        got = program(*arrays)
        difference = lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(y).max())
        moves = "all-gather", "all-to-all", "collective-permute"
        moved = [move for move in moves if move + "(" in text]
        alike = [
            x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
            for x, spec in zip(got, result_specs, strict=True)
        ]
        return max(map(difference, got, want)), moved, all(alike)

    def mapped(function, specs, result_specs):
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result_specs)

    q, k, v = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)
    rows_and_heads = P("data", None, "model")
    one, arrays, results = outputs_and_gradients(attend), (q, k, v, normal(N)), []
    want = jax.jit(one)(*arrays)
    for spec in (P(("data", "model")), rows_and_heads):
        specs = (spec, spec, spec, P(spec[2]) if len(spec) > 2 else P())
        if "jit" in ways:
            results.append(compare(want, one, arrays, specs, (*specs, spec)))
        if "shard_map" in ways and spec == rows_and_heads:
            split = outputs_and_gradients(mapped(attend, specs, spec))
            results.append(compare(want, split, arrays, specs, (*specs, spec)))
    if "shard_map" in ways:
        blocks = normal(B, K, S, H), normal(B, K, S, H)
        i = jnp.asarray(rng.integers(0, S, (B, 1)), jnp.int32)
        block = P("data", "model")
        specs = (rows_and_heads,) * 3 + (block,) * 2 + (P("data"),)
        result_specs = block, block, rows_and_heads
        splits = {"jit": step, "shard_map": mapped(step, specs, result_specs)}
        arrays = q, k, v, *blocks, i
        want = jax.jit(step)(*arrays)
        for split in map(splits.get, ways):
            results.append(compare(want, split, arrays, specs, result_specs))
    print(json.dumps(results))
"""


# Under plain jit xla's loops are split by XLA itself; 600 cells are several of its tiles. The
# kernel of splash does not run where shard_map checks what varies.
@pytest.mark.parametrize(
    ("backend", "cells", "ways"),
    [
        ("triton_interpret", 40, ("jit", "shard_map")),
        ("splash_interpret", 40, ("jit",)),
        ("xla", 600, ("shard_map",)),
    ],
)
def test_nothing_is_gathered(backend, cells, ways):
    x = jnp.zeros((1, 2, 1, 32))
    try:
        jax.eval_shape(lambda x: attention(x, x, x, backend=backend), x)
    except NotImplementedError as error:
        pytest.skip(str(error))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), backend, str(cells), *ways],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for difference, moved, alike in json.loads(result.stdout):
        assert difference < 1e-5  # float32 rounding
        assert moved == []
        assert alike  # results lie as their operands
