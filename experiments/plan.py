"""What a training step needs of each device, before there are any.

    python -m experiments.plan --config=experiments/configs/llama.py:llama-70b \\
        --mesh='fsdp=64,tensor=4'

The step is compiled for as many CPU devices as the mesh has, without any arrays. Where arrays lie
and what moves between devices is the same on other devices; temporary arrays, with their kernels
and their compiler, differ somewhat.
"""

import math
from functools import partial

from absl import flags
from ml_collections import config_flags

from experiments.run import cli

with cli.flag_errors():
    _CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/demo.py")
_MESH = flags.DEFINE_string("mesh", None, "The mesh; by default the config's. No size may be -1.")


def main(argv):
    """Compiles the step of a config on a mesh, and prints what each device holds and moves."""
    del argv
    import jax

    from experiments.run.config import read_config
    from transformer.devices.mesh import mesh_shape

    with cli.flag_errors():
        _CONFIG.value.keys()
    with cli.user_errors(ValueError):
        experiment = read_config(_CONFIG.value)
        sizes = _MESH.value or experiment.devices.mesh
        if "-1" in sizes:
            raise ValueError(
                f"--mesh={sizes!r}; give every size, as there are no devices to count."
            )
        devices = math.prod(mesh_shape(sizes, 2**30).values())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    with cli.user_errors(ValueError, NotImplementedError):
        held, moved = plan(experiment, sizes)
    rows = [(name, _size(size)) for name, size in held.items()]
    cli.print_table(f"{sizes}, each of {devices} devices", ["holds", "size"], rows)
    rows = [(f"{m.count} x {kind}", _size(m.bytes)) for kind, m in moved.items()]
    cli.print_table("and each step", ["takes part in", "size"], rows or [("nothing", "")])


def plan(experiment, sizes: str) -> tuple[dict[str, int], dict]:
    """What each device holds, in bytes, and what moves between devices, as `collectives` says.

    Args:
      experiment: a config; of its tokenizer only the number of tokens counts.
      sizes: those of the mesh, for which there must be devices.
    """
    import jax
    import jax.numpy as jnp

    from experiments.run.prepare import make_step
    from transformer.data.batches import Batch
    from transformer.devices.collectives import collectives
    from transformer.devices.layout import batch_sharding, check_batch, state_shardings
    from transformer.devices.mesh import make_mesh
    from transformer.program.init import init_cache
    from transformer.training.optimizer import make_optimizer
    from transformer.training.step import init_state

    data, train = experiment.data, experiment.train
    model = experiment.architecture(257 if data.tokenizer == "bytes" else data.vocab_size)
    mesh = make_mesh(sizes)
    check_batch(mesh, data.batch_size, data.length)
    optimizer = make_optimizer(experiment.optimizer, train.steps, model.width)
    init = partial(init_state, model, optimizer, ema_decay=train.ema_decay)
    state = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(mesh, state)
    lying = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    state = jax.tree.map(lying, state, shardings)
    rows = lambda dtype: lying(
        jax.ShapeDtypeStruct((data.batch_size, data.length), dtype), batch_sharding(mesh)
    )
    batch = Batch(rows(jnp.int32), rows(jnp.int32), rows(jnp.int32), rows(jnp.float32))
    step = make_step(train, model, optimizer, shardings)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    gradients = _bytes(state.params)
    held = {
        "parameters": _bytes(state.params),
        "optimizer's state": _bytes(state.optimizer_state),
        "moving average": _bytes(state.ema),
        "batch": _bytes(batch),
        "gradients": gradients,
        "activations and other temporary arrays": max(memory.temp_size_in_bytes - gradients, 0),
    }
    held["all of it"] = sum(held.values())
    cache = jax.eval_shape(lambda: init_cache(model, data.length))
    held[f"besides, when sampling: a cache of {data.length} positions"] = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)
    )
    return held, collectives(compiled.as_text())


def _bytes(tree):
    """Of the part that one device holds."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _size(number):
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


if __name__ == "__main__":
    cli.start(main)
