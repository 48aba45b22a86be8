"""Logical axes: what lies where, and what the compiler is told."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from transformer.axes import (
    MESH_AXES,
    RULES,
    constrain,
    gather_tokens,
    partition,
    split_heads,
    split_over,
    split_queries,
)
from transformer.devices.mesh import make_mesh


def test_partition():
    assert partition("rows", None, "heads") == P(("data", "fsdp"), None, "tensor")


def test_without_a_mesh_nothing_is_said():
    assert "sharding_constraint" not in str(
        jax.make_jaxpr(lambda x: constrain(x, None))(jnp.ones(3))
    )


def test_mapped_axes_lie_as_their_name_says():
    rows = jax.vmap(lambda x: constrain(x, "heads"), spmd_axis_name=RULES["rows"])
    with jax.set_mesh(make_mesh("", jax.devices()[:1])):
        jaxpr = str(jax.make_jaxpr(rows)(jnp.ones((2, 3))))
    assert "(('data', 'fsdp'), 'tensor')" in jaxpr


def abstract(*sizes):
    """Within it, there is a mesh of these sizes."""
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, MESH_AXES, kinds))


def test_what_does_not_divide_is_not_split():
    assert split_over(8, "rows") == ()
    with abstract(1, 2, 2, 2):
        assert split_over(8, "rows") == ("fsdp",)
        assert split_over(8, "rows", "tokens", "heads") == ("fsdp", "context", "tensor")
        assert split_over(3, "tokens") == ()


def test_tokens_are_gathered_where_they_are_split():
    def text(*shape):
        return str(jax.make_jaxpr(gather_tokens)(jax.ShapeDtypeStruct(shape, jnp.float32)))

    with abstract(1, 1, 2, 2):
        assert "UNCONSTRAINED, None, UNCONSTRAINED" in text(3, 4, 5)
        assert "sharding_constraint" not in text(3, 5, 8)  # there is no half of 5 tokens


@pytest.mark.parametrize(
    ("T", "N", "own"),
    [(4, 8, 2), (4, 6, 3), (4, 3, 3), (5, 8, 8)],  # by two axes, by one, by none
)
def test_tokens_are_exchanged_for_heads(T, N, own):
    seen = []

    def rows(block, i, cells, queries):
        seen.append((block.shape, i.shape, cells.shape, queries.shape))
        return block, queries

    shapes = (3, N, 7), (3, T), (3, T, N), (3, T, N, 5)
    with abstract(1, 1, 2, 2):
        split = split_heads(rows, T, N)
        _, z = jax.eval_shape(split, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    assert z.shape == (3, T, N, 5)
    assert set(seen) == {((3, own, 7), (3, T), (3, T, own), (3, T, own, 5))}


def test_devices_read_for_the_queries_of_their_tokens():
    def text(length):
        q, keys = (jax.ShapeDtypeStruct((2, n, 3), jnp.bfloat16) for n in (length, 6))
        read = lambda keys, values, shared, q, i, starts: q * keys.sum()
        split = lambda q, keys: split_queries(read, length)(keys, keys, None, q, None, None)
        return str(jax.make_jaxpr(split)(q, keys))

    with abstract(1, 1, 2, 2):
        assert "shard_map" in text(4) and "f32[2,6,3]" in text(4)
        assert "shard_map" not in text(5)  # there is no half of 5 tokens


# The number of devices is fixed when JAX starts, so eight of them take a process of their own.
PROGRAM = """
    import json, sys
    import jax, numpy as np
    from transformer import Model, generate, score
    from transformer.config import Config, Delta, Latent
    from transformer.devices.collectives import collectives
    from transformer.devices.layout import shard_params
    from transformer.devices.mesh import make_mesh
    from transformer.inference import prefill, rows, speculation
    from transformer.program.init import init_params

    config = Config(
        vocab_size=64, max_length=512, num_layers=3, width=16, num_heads=4, num_kv_heads=2,
        layer_kinds=("attention", "latent", "delta"),
        latent=Latent(rank=8, rotary_size=4), num_experts=4, experts_per_token=2,
        delta=Delta(num_key_heads=2, num_value_heads=4, key_size=4, value_size=4),
    )
    params = init_params(config, jax.random.key(0))
    random = np.random.default_rng(int(sys.argv[1]))
    prompts = [random.integers(0, 64, n) for n in (5, 70, 9, 30)]
    gathered, shares = {}, []

    def watch(module, name):
        function = getattr(module, name)

        def watched(*operands):
            result = function(*operands)
            moved = collectives(function.lower(*operands_of(operands)).compile().as_text())
            gathered[name] = moved["all-gather"].largest if "all-gather" in moved else 0
            if name in ("decode", "verify"):
                cache = jax.tree.leaves(result[0].cache)
                part = sum(x.addressable_shards[0].data.nbytes for x in cache)
                shares.append(part / sum(x.nbytes for x in cache))
            return result

        setattr(module, name, watched)

    def operands_of(operands):
        # What was donated is gone; its shape and place are all that compiling takes.
        of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return jax.tree.map(lambda x: of(x) if isinstance(x, jax.Array) else x, operands)

    def results(model):
        made = generate(model, prompts, max_new_tokens=6, seed=3)
        return {
            "tokens": [x.tokens for x in made],
            "logprobs": [[float(p) for p in x.logprobs] for x in made],
            "scores": score(model, prompts[1]).tolist(),
        }

    one = results(Model(config, params, None))
    watch(prefill, "run_chunks")
    watch(rows, "decode")
    watch(speculation, "verify")
    many = {}
    drafts = json.loads(sys.argv[2])
    for sizes in sys.argv[3:]:
        gathered.clear(), shares.clear()
        with jax.set_mesh(mesh := make_mesh(sizes)):
            many[sizes] = results(model := Model(config, shard_params(mesh, params), None))
            if drafts:
                draft = speculation.Smaller(model, tokens=2)
                drafted = generate(model, prompts, max_new_tokens=6, seed=3, draft=draft)
                many[sizes]["drafted"] = [x.tokens for x in drafted]
        many[sizes] |= {"gathered": dict(gathered), "share": max(shares)}
    print(json.dumps([one, many]))
"""


@pytest.fixture(scope="module")
def generated(request, seed):
    """What one device makes of prompts, and what several do on each of the meshes."""
    meshes = ["data=2,tensor=2"]
    thorough = request.config.getoption("--thorough")
    if thorough:
        meshes += ["data=4", "tensor=2", "tensor=8", "data=2,fsdp=2,tensor=2"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(seed), json.dumps(thorough), *meshes],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_sequences_are_generated_and_scored_on_a_mesh_as_on_one_device(generated):
    one, many = generated
    for mesh in many.values():
        assert mesh["tokens"] == one["tokens"]
        for name in ("logprobs", "scores"):
            # float32 sums in another order, in three layers
            np.testing.assert_allclose(np.array(mesh[name]), np.array(one[name]), atol=2e-5)


def test_sequences_lie_on_the_devices_that_run_them(generated):
    mesh = generated[1]["data=2,tensor=2"]
    assert mesh["share"] <= 1 / 2
    # One head of one sequence has 512 cells of 4 numbers in the cache.
    assert max(mesh["gathered"].values()) < 512 * 4


@pytest.mark.thorough
def test_drafts_change_nothing_on_a_mesh(generated):
    one, many = generated
    assert all(mesh["drafted"] == one["tokens"] for mesh in many.values())
