"""Compiles a whole program for an H100 that is not there, and prints what XLA made of it as JSON.

    python compile_for_h100.py decode FOLDER

It is a program of its own, because XLA reads where to write its list of thunks (what it launches,
one after the other) when a process begins. `test_whole_programs.py` runs it.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels.tracing.target import target
from transformer.config import Config
from transformer.data.batches import Batch
from transformer.inference.decode import State, decode, stop_ids
from transformer.inference.prefill import chunk_size, run_chunks
from transformer.inference.prepare import cast_params
from transformer.inference.sampling import Sampling
from transformer.program.init import init_cache, init_params
from transformer.program.program import program
from transformer.training.optimizer import OptimizerConfig, make_optimizer
from transformer.training.step import init_state, make_train_step

CAPACITY, ROWS = 2048, 3
CONFIG = Config(
    vocab_size=512,
    max_length=CAPACITY,
    num_layers=2,
    width=256,
    num_heads=8,
    num_kv_heads=2,
    head_size=128,
    dtype="bfloat16",
)


def decode_loop(numerics="fast"):
    """The loop of `generate` that draws tokens."""
    f, params, cache = _model(numerics)
    row = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    state = State(cache, row, row, jax.ShapeDtypeStruct((ROWS, 2), jnp.uint32))
    running, sampling = np.ones(ROWS, bool), Sampling.make(vocab_size=CONFIG.vocab_size)
    return decode, (f, params, state, running, sampling, stop_ids(()), np.int32(4))


def prefill():
    """The loop of `generate` that runs prompts of several lengths."""
    f, params, cache = _model()
    ends = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((ROWS, CAPACITY), jnp.int32)
    return run_chunks, (f, params, cache, tokens, ends, np.int32([0, 2]), chunk_size())


def train():
    """A training step."""
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = jax.eval_shape(partial(init_state, CONFIG, optimizer), jax.random.key(0))
    rows = lambda dtype: jax.ShapeDtypeStruct((ROWS, CAPACITY), dtype)
    batch = Batch(rows(np.int32), rows(np.int32), rows(np.int32), rows(np.float32))
    return make_train_step(CONFIG, optimizer, attention="triton"), (state, batch)


PROGRAMS = {
    "decode": decode_loop,
    "exact_decode": partial(decode_loop, "exact"),
    "prefill": prefill,
    "train": train,
}


def _model(numerics="fast"):
    params = jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0))
    params = jax.eval_shape(partial(cast_params, CONFIG), params)
    cache = jax.eval_shape(partial(init_cache, CONFIG, CAPACITY))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((ROWS, *x.shape), x.dtype), cache)
    return program(CONFIG, numerics=numerics, attention="triton"), params, rows


def main(name, folder):
    description = Path(__file__).with_name("h100.txtpb").read_text()
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=description)
    sharding = SingleDeviceSharding(topology.devices[0])
    on = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)
    with target("gpu", 90):
        function, arguments = PROGRAMS[name]()
        static = lambda x: callable(x) or isinstance(x, int)
        arguments = [x if static(x) else jax.tree.map(on, x) for x in arguments]
        compiled = function.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    [thunks] = Path(folder).glob("*jit_*thunk_sequence_after_thunk_passes.txt")
    print(json.dumps({"thunks": thunks.read_text(), "text": compiled.as_text()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
