"""Files that were changed to do harm: a clear error, or a model; never a crash, never code run."""

import json
import os

import numpy as np
import pytest

from transformer import load
from transformer.storage.formats import safetensors
from transformer.storage.formats.gguf_file import read_file
from transformer.storage.formats.huggingface import read_directory, read_tensors

MUTATIONS = 1000  # of each kind of file


def mutated(rng, content: bytes) -> bytes:
    """The bytes with some of them changed, cut off, repeated or put in, mostly in the header."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, min(len(content), 4096)))
        kind = rng.integers(0, 5)
        if kind == 0:
            content[place] = rng.integers(0, 256)
        elif kind == 1:
            del content[place : place + int(rng.integers(1, 9))]
        elif kind == 2:
            content[place:place] = content[place : place + int(rng.integers(1, 65))]
        elif kind == 3:
            content[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x80"])
        else:
            del content[max(place, 16) :]
        content = content or bytearray(1)
    return bytes(content)


def read_all(tensors):
    for tensor in tensors.values():
        tensor.read()


def test_mutated_safetensors(tmp_path, rng, published_named):
    content = (published_named("llama") / "model.safetensors").read_bytes()
    path, refused = tmp_path / "model.safetensors", 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(rng, content))
        try:
            read_all(safetensors.read_header(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > MUTATIONS / 2


def test_mutated_gguf(tmp_path, rng):
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_float32("llama.rope.freq_base", 1.5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.add_tensor("output.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content, refused = path.read_bytes(), 0
    before, after = content.rsplit((512).to_bytes(8, "little"), 1)  # where the second begins
    path.write_bytes(before + bytes(8) + after)
    with pytest.raises(ValueError, match=r"begins before the one before it ends"):
        read_file(path)
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(rng, content))
        try:
            read_all(read_file(path)[1])
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > MUTATIONS / 4


VALUES = [None, -1, 0, 1, 2**31, 2**70, 1.5, float("nan"), "x", "", [], [1], {}, {"a": 1}, True]


def test_mutated_configs(llama, rng):
    path = llama / "config.json"
    config = json.loads(path.read_text())
    os.truncate(llama / "model.safetensors", 100)  # which is looked at after the config
    for _ in range(MUTATIONS):
        changed = dict(config)
        for name in rng.choice(list(config), 2):
            changed[str(name)] = VALUES[rng.integers(len(VALUES))]
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError):
            read_directory(llama)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5])
def test_an_index_names_only_files_beside_it(llama, name):
    os.rename(llama / "model.safetensors", llama / "one.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"plain name that ends in|no weight_map"):
        read_tensors(llama)


def test_pickles_are_refused(llama):
    os.rename(llama / "model.safetensors", llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which is a pickle"):
        load(llama)
    os.remove(llama / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load(llama)
