"""Data-parallel training on several devices equals training on one."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from transformer.data.batches import Batch
from transformer.devices.mesh import make_mesh, shard_batch

# The number of devices is fixed when JAX starts, so eight of them take a process of their own.
PROGRAM = """
    import json, math, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec
    from transformer.config import Config
    from transformer.data.batches import Batch
    from transformer.training.optimizer import OptimizerConfig, make_optimizer
    from transformer.devices.mesh import make_mesh, shard_batch, state_shardings
    from transformer.training.step import init_state, make_train_step

    B, T, V = 16, 272, 41  # more than one tile of attention, and odd sizes beside
    adamw = Config(vocab_size=V, max_length=T, num_layers=1, width=16, num_heads=2, window=64)
    muon = Config(vocab_size=V, max_length=T, num_layers=2, width=16, num_heads=2, scan_layers=True)
    random = np.random.default_rng(0)
    cells = np.arange(T, dtype=np.int32)
    packed = np.stack([np.where(cells < cut, cells, cells - cut) for cut in range(3, 3 + B)])

    def random_batch():
        tokens, targets = random.integers(0, V, (2, B, T), dtype=np.int32)
        return Batch(tokens, targets, packed, random.random((B, T), dtype=np.float32))

    def run(config, name, accumulate):
        optimizer = make_optimizer(OptimizerConfig(name, learning_rate=0.01, warmup_steps=1), 9)
        options = {"accumulate": accumulate, "ema_decay": 0.9}
        mesh = make_mesh()
        one = init_state(config, optimizer, jax.random.key(0), 0.9)
        shardings = state_shardings(mesh, one)
        many = jax.device_put(jax.tree.map(jnp.copy, one), shardings)
        one_step = make_train_step(config, optimizer, **options)
        many_step = make_train_step(config, optimizer, state_shardings=shardings, **options)
        many_step = many_step.lower(many, shard_batch(mesh, random_batch())).compile()
        metrics = []
        for _ in range(4):
            batch = random_batch()
            one, a = one_step(one, batch)
            many, b = many_step(many, shard_batch(mesh, batch))
            metrics.append([[float(m[name]) for name in ("loss", "gradient_norm")] for m in (a, b)])
        share = lambda tree: (
            sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
            / sum(x.nbytes for x in jax.tree.leaves(tree))
        )
        difference = max(
            float(jnp.abs(x - np.asarray(y)).max())
            for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True)
        )
        collectives = re.findall(
            r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\\(",
            many_step.as_text(),
        )
        arrays = re.findall(r"\\[([\\d,]+)\\]", " ".join(collectives))
        moved = max(math.prod(map(int, shape.split(","))) for shape in arrays)
        return {
            "metrics": metrics,
            "difference": difference,
            "shares": [share(many.params), share(many.optimizer_state), share(many.ema)],
            "replicated": all(x.sharding.is_fully_replicated for x in jax.tree.leaves(many.params)),
            "moved": moved,
            "largest_parameter": max(x.size for x in jax.tree.leaves(many.params)),
            "activation": B // 8 * T * config.width,
        }

    print(json.dumps([run(adamw, "adamw", 1), run(muon, "muon", 2)]))
"""


@pytest.fixture(scope="module")
def results():
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    environment |= {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_eight_devices_train_like_one(results):
    for result in results:
        for one, eight in result["metrics"]:
            # float32 sums in another order, and four updates that divide by small moments.
            np.testing.assert_allclose(eight, one, rtol=1e-5)
        assert result["difference"] < 0.01 * 4 * 1e-2


def test_the_optimizer_state_is_split_and_parameters_are_not(results):
    for result in results:
        params, optimizer_state, ema = result["shares"]
        assert params == 1 and result["replicated"]
        # An eighth, and the few arrays that do not divide by eight whole on each device.
        assert optimizer_state < 0.2 and ema < 0.2


def test_what_moves_between_devices_is_no_larger_than_a_parameter(results):
    for result in results:
        # An activation [B, T, E], even one device's part of it, would be.
        assert result["moved"] <= result["largest_parameter"] < result["activation"]


def test_rows_that_do_not_divide_are_an_error():
    mesh = make_mesh([jax.devices()[0]] * 1)
    batch = Batch(*(np.zeros((3, 2), np.int32) for _ in range(4)))
    assert shard_batch(mesh, batch).tokens.sharding.mesh == mesh
    two = jax.sharding.AbstractMesh((2,), ("data",))
    with pytest.raises(ValueError, match="3 rows cannot be split over 2 devices"):
        shard_batch(two, batch)
