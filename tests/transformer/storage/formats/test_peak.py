"""How much memory loading takes at most, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from transformer.program.fit import abstract_params
from transformer.storage.formats import safetensors
from transformer.storage.formats.architectures import FAMILIES
from transformer.storage.formats.parameters import written

# 61 million parameters, of which the embedding and the output are 17 % each.
VALUES = {
    "model_type": "llama",
    "vocab_size": 20_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
# A small model first, so that code which is mapped when it first runs is there before.
LOAD = """
import re, sys
import jax
from transformer import load

def memory(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

small, path, dtype, weights = sys.argv[1:]
weights = weights or None
load(small, weights=weights)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
model = jax.block_until_ready(load(path, dtype=dtype, weights=weights).params)
print((memory("VmHWM") - before) / sum(x.nbytes for x in jax.tree.leaves(model)))
"""


def sparse(path, shapes):
    """A file of safetensors whose numbers are zeros that no disk holds."""
    safetensors.write(path, shapes, iter(()))
    size = sum(np.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    os.truncate(path, path.stat().st_size + int(size))


def sparse_gguf(path, shapes):
    """The same as a file of GGUF, in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(VALUES["max_position_embeddings"])
    writer.add_embedding_length(VALUES["hidden_size"])
    writer.add_block_count(VALUES["num_hidden_layers"])
    writer.add_feed_forward_length(VALUES["intermediate_size"])
    writer.add_head_count(VALUES["num_attention_heads"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, VALUES["num_hidden_layers"])
    total = 0
    for name, (shape, dtype) in shapes.items():
        kind = gguf.GGMLQuantizationType[("F32", "Q8_0")[len(shape) - 1]]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(shape)) // block * block_bytes
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(target, shape, dtype, size, raw_dtype=kind)
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
def test_loading_takes_little_more_than_the_parameters(published_named, tmp_path):
    family = FAMILIES["llama"]
    config = family.read(VALUES, "a config")
    zeros = lambda x: np.broadcast_to(np.float32(0), x.shape)
    params = jax.tree.map(zeros, abstract_params(config))
    float32 = np.dtype(np.float32)
    shapes = {name: (x.shape, float32) for name, x in written(family, config, params, float32)}
    whole, shards, file = tmp_path / "whole", tmp_path / "shards", tmp_path / "a.gguf"
    for directory in (whole, shards):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(VALUES))
    sparse(whole / "model.safetensors", shapes)
    names = {name: f"part-{n % 3}.safetensors" for n, name in enumerate(shapes)}
    for part in set(names.values()):
        sparse(shards / part, {name: shapes[name] for name in shapes if names[name] == part})
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    sparse_gguf(file, shapes)
    small = str(published_named("llama"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, small, path, dtype, weights],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for path, dtype, weights in (
            (whole, "bfloat16", ""),
            (shards, "float32", ""),
            (file, "float32", ""),
            (file, "float32", "panels"),
        )
    ]
    peaks = [float(process.communicate()[0]) for process in processes]
    # What is wanted; the parameters alone are 1, and the embedding as it is read 0.17.
    assert max(peaks) <= 1.3, peaks
