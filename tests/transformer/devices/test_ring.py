"""Why positions split over devices gather keys and values: what a ring of devices would change.

A ring (arXiv:2310.01889) hands each part of the keys and values from device to device, so that none
ever holds all of them. Here both are written for one layer, with the same tiles and a gradient that
keeps nothing of the size of the scores, and their compiled programs are compared.
"""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

# The number of devices is fixed when JAX starts, so eight of them take a process of their own.
PROGRAM = """
    import json, sys
    from collections import Counter
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from transformer.devices.collectives import collectives

    DEVICES = 8
    mesh = jax.make_mesh((DEVICES,), ("context",), (jax.sharding.AxisType.Auto,))
    here = lambda: jax.lax.axis_index("context")
    turn = lambda x: jax.lax.ppermute(
        x, "context", [(n, (n + 1) % DEVICES) for n in range(DEVICES)])
    whole = lambda x: jax.lax.all_gather(x, "context")  # [DEVICES, K, T, H]

    def scores(q, k, part):
        # q [K, G, T, H], k [K, T, H] of a part: [K, G, T, S], -inf where a query does not see.
        cells = jnp.arange(q.shape[2])
        seen = (here() * len(cells) + cells)[:, None] >= part * len(cells) + cells
        return jnp.where(seen, jnp.einsum("kgth,ksh->kgts", q, k), -jnp.inf)

    def read(q, carry, k, v, part):
        total, out = carry  # the logarithm of all weights so far, and what was read by them
        logits = scores(q, k, part)
        new = jnp.logaddexp(total, jax.nn.logsumexp(logits, -1))
        safe = jnp.where(jnp.isfinite(new), new, 0)
        add = jnp.einsum("kgts,ksh->kgth", jnp.exp(logits - safe[..., None]), v)
        return new, out * jnp.exp(total - safe)[..., None] + add

    def gradients(q, k, v, part, total, out_grad, inner):
        weights = jnp.exp(scores(q, k, part) - total[..., None])
        of_weights = jnp.einsum("kgth,ksh->kgts", out_grad, v)
        of_logits = weights * (of_weights - inner[..., None])
        return (
            jnp.einsum("kgts,ksh->kgth", of_logits, k),
            jnp.einsum("kgts,kgth->ksh", of_logits, q),
            jnp.einsum("kgts,kgth->ksh", weights, out_grad),
        )

    def begin(q):
        return jnp.full(q.shape[:-1], -jnp.inf), jnp.zeros(q.shape)

    def gathered(q, k, v):
        step = lambda carry, x: (read(q, carry, *x), None)
        return jax.lax.scan(step, begin(q), (whole(k), whole(v), jnp.arange(DEVICES)))[0]

    def gathered_gradients(q, k, v, *saved):
        def step(q_grad, x):
            q_part, *grads = gradients(q, *x, *saved)
            return q_grad + q_part, grads
        parts = whole(k), whole(v), jnp.arange(DEVICES)
        q_grad, grads = jax.lax.scan(step, jnp.zeros(q.shape), parts)
        return q_grad, *(jax.lax.psum_scatter(x, "context") for x in grads)

    def ring(q, k, v):
        def step(carry, n):
            state, k, v = carry
            state = read(q, state, k, v, (here() - n) % DEVICES)
            return (state, turn(k), turn(v)), None
        return jax.lax.scan(step, (begin(q), k, v), jnp.arange(DEVICES))[0][0]

    def ring_gradients(q, k, v, *saved):
        def step(carry, n):
            q_grad, k, v, k_grad, v_grad = carry
            add = gradients(q, k, v, (here() - n) % DEVICES, *saved)
            rest = k, v, k_grad + add[1], v_grad + add[2]
            return (q_grad + add[0], *map(turn, rest)), None
        zeros = jnp.zeros(q.shape), k, v, jnp.zeros(k.shape), jnp.zeros(v.shape)
        (q_grad, _, _, *grads), _ = jax.lax.scan(step, zeros, jnp.arange(DEVICES))
        return q_grad, *grads

    queries, cells = P(None, None, "context"), P(None, "context")
    over_positions = lambda f, takes, gives: jax.jit(jax.shard_map(
        f, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False))

    # Two programs: other layers come in between, and what was gathered is not kept.
    def layer(forward, backward):
        return (
            over_positions(forward, (queries, cells, cells), (queries, queries)),
            over_positions(
                lambda q, k, v, total, out, out_grad: backward(
                    q, k, v, total, out_grad, (out * out_grad).sum(-1)),
                (queries, cells, cells, queries, queries, queries), (queries, cells, cells)),
        )

    ways = {
        "gathered": layer(gathered, gathered_gradients), "ring": layer(ring, ring_gradients),
    }

    def figures(way, K, G, T, H):
        of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        q, k, (forward, backward) = of(K, G, T, H), of(K, T, H), ways[way]
        programs = [
            forward.lower(q, k, k).compile(),
            backward.lower(q, k, k, of(K, G, T), q, q).compile(),
        ]
        moved = Counter()
        for program in programs:
            for name, kind in collectives(program.as_text()).items():
                moved[name] += kind.bytes
        temporary = [program.memory_analysis().temp_size_in_bytes for program in programs]
        return {"temporary": temporary, "moved": moved}

    def results(way):
        random = np.random.default_rng(0)
        q, out_grad = random.normal(size=(2, 2, 3, 32, 4)).astype(np.float32)
        k, v = random.normal(size=(2, 2, 32, 4)).astype(np.float32)
        forward, backward = ways[way]
        total, out = forward(q, k, v)
        all_of_it = out, *backward(q, k, v, total, out, out_grad)
        return [np.asarray(x).ravel().tolist() for x in all_of_it]

    shape = json.loads(sys.argv[1])
    print(json.dumps({way: {"results": results(way)} | figures(way, *shape) for way in ways}))
"""
K, G, T, H = 8, 4, 32768, 128  # a layer of Llama 3 8B: key heads, queries of each, tokens, size
DEVICES = 8


@pytest.mark.thorough
def test_a_ring_moves_as_much_and_holds_no_whole_keys_and_values():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps([K, G, T, H])],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    gathered, ring = found["gathered"], found["ring"]
    print({way: {n: x for n, x in found[way].items() if n != "results"} for way in found})
    for one, other in zip(gathered["results"], ring["results"], strict=True):
        # float32 sums of 32 numbers in another order, divided by weights that are not small.
        np.testing.assert_allclose(one, other, atol=1e-4)
    # What a reduce-scatter leaves on a device is one of the parts that it takes in.
    moved = gathered["moved"]
    assert moved["all-gather"] + DEVICES * moved["reduce-scatter"] == sum(ring["moved"].values())
    # Keys and values, and in the backward their gradients too: all of them there, and here a part
    # that comes and one that goes.
    saved = np.subtract(gathered["temporary"], ring["temporary"])
    whole = 2 * T * K * H * 4
    assert whole / 2 < saved[0] <= whole < saved[1] <= 2 * whole
