"""Files of GGUF: their metadata and their tensors, checked, and numbers of fewer bits made floats.

The package gguf gives the types and their arithmetic. Its reader takes seconds for a vocabulary,
and keeps the whole file mapped.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np

from transformer.storage.buffers import buffer

_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_BLOCKS = 4096  # are made floats at a time, which stay in the processor's cache


@dataclass(frozen=True)
class Quantised:
    """A tensor of a file, in one of the types of ggml.

    Attributes:
      path: the file.
      offset: where its bytes begin.
      shape: of its numbers.
      kind: a `gguf.GGMLQuantizationType`.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    kind: Any
    dtype = np.dtype(np.float32)

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file it takes."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes

    def read(self, dtype: np.dtype | None = None) -> np.ndarray:
        """The numbers in a type; None: float32."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        count = math.prod(self.shape) // block
        made = buffer((count, block), self.dtype if dtype is None else dtype)
        stored = np.memmap(self.path, np.uint8, "r", self.offset, (count, block_bytes))
        for n in range(0, count, _BLOCKS):
            # As one long row: the package takes rows in small groups, which takes longer than what
            # it does with them.
            row = np.array(stored[n : n + _BLOCKS]).reshape(1, -1)
            made[n : n + _BLOCKS] = gguf.quants.dequantize(row, self.kind).reshape(-1, block)
        return made.reshape(self.shape)


def read_file(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Quantised]]:
    """Reads the metadata of a file, and which tensors it holds.

    Raises:
      ValueError: it is not a file of GGUF, is damaged, or holds a type that is not known.
      OSError: it cannot be read.
    """
    path = Path(path)
    if path.stat().st_size < 24:
        raise _damaged(path, "it is too short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(path, _Cursor(data))
        except (ValueError, RecursionError, struct.error) as error:
            raise _damaged(path, str(error)) from error


def _read(path, cursor):
    if cursor.bytes(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}; known are {_VERSIONS}")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_keys):
        name = cursor.string()
        if name in metadata:
            raise ValueError(f"the key {name[:80]!r} appears twice")
        metadata[name] = cursor.value(cursor.number("I"))
    described = {}
    for _ in range(num_tensors):
        name, axes = cursor.string(), cursor.number("I")
        if name in described or not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"tensor {name[:80]!r} appears twice, or has {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        described[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise ValueError(f"general.alignment={alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {
        name: _tensor(path, name, start, cursor.size, *fields) for name, fields in described.items()
    }
    _require_apart(tensors)
    return metadata, tensors


def _require_apart(tensors):
    """Refuses tensors that overlap."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ValueError(f"tensor {name!r} begins before the one before it ends")
        end = tensor.offset + tensor.num_bytes


def _tensor(path, name, start, size, shape, number, offset):
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(f"tensor {name!r} is of type {number}, which is not known") from error
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block or not all(shape):
        raise ValueError(f"tensor {name!r} of shape {shape} is not made of blocks of {block}")
    tensor = Quantised(path, start + offset, shape, kind)
    if tensor.offset + tensor.num_bytes > size:
        raise ValueError(f"tensor {name!r} of shape {shape} ends behind the end of the file")
    return tensor


class _Cursor:
    """Reads values one after the other, and never past the end."""

    def __init__(self, data):
        self._data, self.size, self.offset = data, len(data), 0

    def bytes(self, count):
        begin, end = self.offset, self.offset + count
        if end > self.size:
            raise ValueError(f"{count} bytes are wanted at byte {begin} of {self.size}")
        self.offset = end
        return self._data[begin:end]

    def number(self, kind):
        [value] = struct.unpack("<" + kind, self.bytes(struct.calcsize("<" + kind)))
        return value

    def string(self):
        return self.bytes(self.number("Q")).decode("utf-8", errors="surrogateescape")

    def value(self, kind):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}, which is not known")
        kind, count = self.number("I"), self.number("Q")
        if count > self.size - self.offset:
            raise ValueError(f"an array of {count} values does not fit")
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            return list(struct.unpack(code, self.bytes(struct.calcsize(code))))
        if kind == _STRING:
            return self._strings(count)
        return [self.value(kind) for _ in range(count)]

    def _strings(self, count):
        """As `string`, for vocabularies of many thousands."""
        data, size, begin = self._data, self.size, self.offset
        length_at, made = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            [length] = length_at(data, begin)
            begin += 8
            if length > size - begin:
                raise ValueError(f"{length} bytes are wanted at byte {begin} of {size}")
            made.append(data[begin : begin + length].decode("utf-8", errors="surrogateescape"))
            begin += length
        self.offset = begin
        return made


def _damaged(path, why):
    return ValueError(f"{path} is damaged, or not a file of GGUF: {why}.")
