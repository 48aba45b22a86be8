"""Files of safetensors: what the library writes and reads, and what it refuses, in the same way."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from transformer.storage.formats import safetensors


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_what_is_written_is_read(tmp_path, rng):
    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b.c": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        "d": rng.integers(0, 255, (2, 0, 3), dtype=np.uint8),
        "e": np.float16(2.5),
    }
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    safetensors.write(tmp_path / "x.safetensors", shapes, iter(tensors.values()))
    read = safetensors.read_header(tmp_path / "x.safetensors")
    assert list(read) == list(tensors)
    for name, x in tensors.items():
        assert (read[name].shape, read[name].dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(read[name].read(), x)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"\xff\xfe{}", b"", "not JSON in UTF-8"),
        (b"[" * 100_000, b"", "not JSON in UTF-8"),
        (b"[]", b"", "its header is not an object"),
        (b'{"a": 1, "a": 2}', b"", "a name appears twice"),
        ({"a": 5}, b"", "is not described by dtype, shape and data_offsets"),
        ({"a": ONE | {"data_offsets": [0]}}, b"", "is not described"),
        ({"a": ONE | {"dtype": "F31"}}, bytes(8), "is of type 'F31', which is not known"),
        ({"a": ONE | {"shape": [-2]}}, bytes(8), "sizes or offsets that are not whole numbers"),
        ({"a": ONE | {"shape": [2.0]}}, bytes(8), "not whole numbers"),
        ({"a": ONE | {"data_offsets": [-8, 0]}}, bytes(8), "not whole numbers"),
        ({"a": ONE | {"shape": [2**40, 2**40]}}, bytes(8), "does not have the 8 bytes"),
        ({"a": ONE | {"shape": [3]}}, bytes(8), "does not have the 8 bytes"),
        ({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8), "does not have the -8 bytes"),
        ({"a": ONE, "b": ONE}, bytes(8), "does not begin where the one before it ends"),
        ({"a": ONE | {"data_offsets": [4, 12]}}, bytes(12), "does not begin where"),
        ({"a": ONE}, bytes(4), "tensors end at byte 77, and the file at byte 73"),
        ({"a": ONE}, bytes(12), "and the file at byte"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        safetensors.read_header(file_of(tmp_path / "x", header, data))


@pytest.mark.parametrize("content", [b"", b"abc", (2**63).to_bytes(8, "little") + b"{}"])
def test_headers_that_do_not_fit_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="does not fit its"):
        safetensors.read_header(tmp_path / "x")


def test_a_pickle_is_refused_and_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    for content in (pickle.dumps(Trap()), b"PK\x03\x04" + bytes(60)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="is a pickle, PyTorch's format, which can run code"):
            safetensors.read_header(tmp_path / "x")
    assert not (tmp_path / "trapped").exists()
