"""Training on a mesh of eight devices equals training on one, whatever the mesh."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from transformer import Config, init_params
from transformer.axes import MESH_AXES
from transformer.data.batches import Batch
from transformer.devices.layout import param_shardings, shard_batch

# The number of devices is fixed when JAX starts, so eight of them take a process of their own.
PROGRAM = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from transformer.config import Config, Delta, Latent
    from transformer.data.batches import Batch
    from transformer.devices.collectives import collectives
    from transformer.devices.layout import shard_batch, shard_params, state_shardings
    from transformer.devices.mesh import make_mesh
    from transformer.program.init import init_params
    from transformer.training.evaluation import make_eval_step
    from transformer.training.optimizer import OptimizerConfig, make_optimizer
    from transformer.training.step import init_state, make_train_step

    STEPS = 5
    attention = Config(
        vocab_size=42, max_length=128, num_layers=2, width=8, num_heads=4, num_kv_heads=2,
        window=32, attention_sinks=True, scan_layers=True, feed_forward_width=8, num_experts=4,
        experts_per_token=2,
    )
    kinds = Config(
        vocab_size=42, max_length=32, num_layers=2, width=16, num_heads=4,
        layer_kinds=("latent", "delta"),
        latent=Latent(rank=8, rotary_size=4),
        delta=Delta(num_key_heads=2, num_value_heads=4, key_size=4, value_size=4),
        tie_embeddings=False, feed_forward_width=24,
    )

    def make_batches(config):
        random, B, T = np.random.default_rng(0), 16, config.max_length
        cells = np.arange(T, dtype=np.int32)
        packed = np.stack([np.where(cells < cut, cells, cells - cut) for cut in range(3, 3 + B)])
        def batch():
            tokens, targets = random.integers(0, config.vocab_size, (2, B, T), dtype=np.int32)
            return Batch(tokens, targets, packed, random.random((B, T), dtype=np.float32))
        return [batch() for _ in range(STEPS)]

    def train(step, state, batches):
        metrics = []
        for batch in batches:
            state, values = step(state, batch)
            metrics.append([float(values[name]) for name in ("loss", "gradient_norm")])
        return state, metrics

    def compare(config, name, accumulate, meshes):
        optimizer = make_optimizer(OptimizerConfig(name, learning_rate=0.01, warmup_steps=1), 9)
        options = {"accumulate": accumulate, "ema_decay": 0.9}
        batches = make_batches(config)
        begin = init_state(config, optimizer, jax.random.key(0), 0.9)
        one = train(
            make_train_step(config, optimizer, **options), jax.tree.map(jnp.copy, begin), batches
        )
        return {sizes: on_mesh(config, optimizer, options, begin, batches, one, sizes)
                for sizes in meshes}

    def on_mesh(config, optimizer, options, begin, batches, one, sizes):
        mesh = make_mesh(sizes)
        shardings = state_shardings(mesh, begin)
        state = jax.device_put(jax.tree.map(jnp.copy, begin), shardings)
        batches = [shard_batch(mesh, batch) for batch in batches]
        step = make_train_step(
            config, optimizer, state_shardings=shardings, loss_parts=4, **options
        )
        with jax.set_mesh(mesh):
            step = step.lower(state, batches[0]).compile()
        state, metrics = train(step, state, batches)
        kept = jax.tree.map(np.array, state.params)
        state, last = step(state, batches[0]._replace(weights=batches[0].weights * np.nan))
        kept = jax.tree.map(lambda x, y: bool((x == np.asarray(y)).all()), kept, state.params)
        share = lambda tree: (
            sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
            / sum(x.nbytes for x in jax.tree.leaves(tree))
        )
        difference = max(
            float(np.abs(x - np.asarray(y)).max()) for x, y in zip(
                jax.tree.leaves(one[0].params), jax.tree.leaves(state.params), strict=True)
        )
        moved = {kind: moved.largest for kind, moved in collectives(step.as_text()).items()}
        layer = sum(x.size for x in jax.tree.leaves(state.params.layers)) // config.num_layers
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        return {
            "metrics": [one[1], metrics],
            "difference": difference,
            "shares": [share(state.params), share(state.optimizer_state), share(state.ema)],
            "guarded": not last["finite"] and all(jax.tree.leaves(kept)),
            "moved": moved,
            "layer": layer,
            "activation": batches[0].tokens.size // rows // options["accumulate"] * config.width,
        }

    def exact_differs(config):
        params, batch = init_params(config, jax.random.key(0)), make_batches(config)[0]
        nll = make_eval_step(config, numerics="exact")
        mesh = make_mesh("data=8")
        with jax.set_mesh(mesh):
            split = nll(shard_params(mesh, params), shard_batch(mesh, batch))
        return bool((np.asarray(split) != np.asarray(nll(params, batch))).any())

    meshes = json.loads(sys.argv[1])
    print(json.dumps({
        "attention": compare(attention, "muon", 2, meshes["attention"]),
        "kinds": compare(kinds, "adamw", 1, meshes["kinds"]),
        "exact differs": exact_differs(attention.replace(num_layers=1, num_experts=0)),
    }))
"""
MESHES = {
    "attention": ["data=8", "fsdp=8", "context=2", "data=2,fsdp=2,tensor=2"],
    "kinds": ["fsdp=2,context=2,tensor=2"],
}
ALL_AXES = "data=2,fsdp=2,context=2,tensor=2"
THOROUGH = {
    "attention": ["tensor=2", ALL_AXES],
    "kinds": ["data=8", "fsdp=8", "tensor=2", "context=2", ALL_AXES],
}


@pytest.fixture(scope="module")
def results(request):
    thorough = request.config.getoption("--thorough")
    meshes = {name: MESHES[name] + THOROUGH[name] * thorough for name in MESHES}
    devices = 16 if thorough else 8
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(meshes)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def runs(meshes, *marks):
    """The names of models and meshes, as tests take them."""
    return [pytest.param(n, mesh, marks=marks) for n in meshes for mesh in meshes[n]]


@pytest.mark.parametrize(("model", "mesh"), [*runs(MESHES), *runs(THOROUGH, pytest.mark.thorough)])
def test_a_mesh_trains_like_one_device(results, model, mesh):
    result = results[model][mesh]
    # float32 sums in another order, and five updates that divide by small moments.
    np.testing.assert_allclose(*result["metrics"], rtol=2e-5)
    assert result["difference"] < 0.01 * 5 * 1e-2
    assert result["guarded"]  # a step that is not finite changes nothing


def test_parameters_are_split_over_fsdp_and_the_optimizer_over_data_too(results):
    shares = {mesh: result["shares"] for mesh, result in results["attention"].items()}
    assert shares["data=8"][0] == 1
    # What does not divide is whole on each device: norms, and of two heads an eighth.
    assert max(shares["data=8"][1:]) < 0.2
    assert max(shares["fsdp=8"]) < 0.2
    assert shares["data=2,fsdp=2,tensor=2"][0] < 0.35
    assert shares["data=2,fsdp=2,tensor=2"][1] < 0.25


ROWS_ALONE = ["data=8", "fsdp=8"]


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        *runs({"attention": ROWS_ALONE}),
        *runs({"kinds": ROWS_ALONE}, pytest.mark.thorough),
    ],
)
def test_rows_of_activations_never_move(results, model, mesh):
    result = results[model][mesh]
    assert result["moved"].keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    # What moves are matrices: no whole layer, and nothing of the size of an activation.
    assert max(result["moved"].values()) <= result["layer"]
    assert max(result["moved"].values()) < result["activation"]


def test_the_tensor_axis_adds_up_activations_and_gathers_none(results):
    result = results["attention"]["data=2,fsdp=2,tensor=2"]
    assert result["moved"]["all-gather"] <= result["layer"] < result["activation"]
    assert result["moved"]["all-reduce"] == result["activation"]


def test_the_context_axis_gathers_keys_and_values(results):
    """Of 2 heads of 2 numbers, where an activation has 8; experts rearrange their tokens."""
    result = results["attention"]["context=2"]
    assert result["moved"].keys() <= {"all-gather", "all-reduce", "all-to-all"}
    assert result["moved"]["all-gather"] == result["activation"] // 2
    assert result["moved"]["all-to-all"] <= result["activation"] // 2


@pytest.mark.thorough
def test_the_context_axis_exchanges_tokens_for_heads_of_the_delta_rule(results):
    """And of its convolution a device has neighbours; latent attention gathers keys and values."""
    result = results["kinds"]["context=2"]
    assert result["moved"]["all-to-all"] < result["activation"]
    assert result["moved"]["collective-permute"] < result["activation"]
    assert result["moved"]["all-gather"] <= 2 * result["activation"]


def test_rows_split_over_devices_have_the_same_bits_in_exact_numerics(results):
    assert not results["exact differs"]


def abstract_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(n, 1) for n in MESH_AXES), MESH_AXES)


def test_batches_that_do_not_divide_are_errors():
    batch = Batch(*(np.zeros((3, 5), np.int32) for _ in range(4)))
    with pytest.raises(ValueError, match="3 rows cannot be split over data x fsdp = 4 devices"):
        shard_batch(abstract_mesh(data=2, fsdp=2), batch)
    with pytest.raises(ValueError, match="rows of 5 tokens cannot be split over context=2"):
        shard_batch(abstract_mesh(context=2), batch)


def test_where_parameters_lie():
    config = Config(
        vocab_size=41, max_length=8, num_layers=2, width=16, num_heads=2, num_experts=2,
        scan_layers=True, biases="all",
    )  # fmt: skip
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    at = param_shardings(abstract_mesh(fsdp=2, tensor=2), params)
    assert at.embedding.spec == P(None, "fsdp")  # 41 rows do not divide by 2
    [layer] = at.layers
    assert layer.mixer.output.weight.spec == P(None, "tensor", "fsdp")
    assert layer.mixer.query.bias.spec == P(None, None)
    assert layer.feed_forward.up.weight.spec == P(None, "tensor", "fsdp", None)
    assert layer.feed_forward.router.weight.spec == P(None, None, None)
