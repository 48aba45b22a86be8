"""Whole programs compiled by XLA for an H100 that is not there: what it launches, what it copies.

`make gpu-compile` fetches XLA for CUDA, 124 MB, and runs these tests.
"""

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[test]")
plugins = importlib.util.find_spec("jax_plugins")  # a folder, which may be left over and empty
if not plugins or not any(pkgutil.iter_modules(plugins.submodule_search_locations)):
    pytest.skip("XLA for CUDA is not installed: make gpu-compile", allow_module_level=True)

SCRIPT = Path(__file__).with_name("compile_for_h100.py")
BLOCK = r"bf16\[3,2,2048,128\]"  # keys or values of one layer


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(name): (the thunks of a program, its text)."""

    def compile(name):
        folder = tmp_path_factory.mktemp(name)
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no cuDNN, and none is needed
            "PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[2], *sys.path))),
            "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_dump_to={folder}",
        }
        command = [sys.executable, SCRIPT, name, folder]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        made = json.loads(result.stdout.splitlines()[-1])
        return _parsed(made["thunks"]), made["text"]

    return compile


def _parsed(thunks):
    """[(kind, kinds of the thunks that hold it)], from a list that is indented."""
    found, above = [], []
    for line in thunks.splitlines():
        if match := re.match(r"( *)\d+: (k\w+)", line):
            above = [(depth, kind) for depth, kind in above if depth < len(match[1])]
            found.append((match[2], [kind for _, kind in above]))
            above.append((len(match[1]), match[2]))
    return found


def kernels(thunks):
    """The Triton kernels of ours: what holds each of them."""
    return [above for kind, above in thunks if kind == "kCustomCall"]


def copies_of_blocks(text):
    return re.findall(rf"= {BLOCK}\S* (?:copy|fusion|dynamic-update-slice)\(.*", text)


def test_a_decode_step_is_one_graph_of_launches_and_copies_no_block(compiled):
    thunks, text = compiled("decode")
    calls = kernels(thunks)
    assert len(calls) == 4  # read and combine, in each of two layers
    assert all("kCommandBuffer" in above and "kWhile" in above for above in calls)
    assert not copies_of_blocks(text)


def test_exact_numerics_decode_in_one_graph_too_and_copy_no_block(compiled):
    thunks, text = compiled("exact_decode")
    # In each of two layers two writes, a read, a merge, and seven products; and the logits.
    calls = kernels(thunks)
    assert len(calls) == 2 * 11 + 1
    assert all("kCommandBuffer" in above and "kWhile" in above for above in calls)
    assert not copies_of_blocks(text)


def test_a_chunk_of_a_ragged_batch_is_written_without_a_loop_over_rows(compiled):
    thunks, text = compiled("prefill")
    assert [kind for kind, _ in thunks].count("kWhile") == 1  # over chunks
    assert len(kernels(thunks)) == 5  # two writes in each layer, and a read in all but the last
    assert all("kCommandBuffer" in above for above in kernels(thunks))
    assert not copies_of_blocks(text)
    assert not re.search(r"%\S*transpose\S* = \S* fusion", text)


def test_a_training_step_holds_no_array_of_queries_by_keys_and_turns_nothing_around(compiled):
    thunks, text = compiled("train")
    # In each layer two writes, forward, and two of the backward pass.
    assert len(kernels(thunks)) == 10
    assert [kind for kind, _ in thunks].count("kConditional") == 1  # a step that is not finite
    assert not re.search(r"\[[\d,]*2048,2048[\d,]*\]", text)
    assert not re.search(r"%\S*transpose\S* = \S* fusion", text)
