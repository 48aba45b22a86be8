"""Files of safetensors: their header, checked, and their tensors, read one by one.

The library of that name maps the whole file and keeps what has been read in memory, beside what is
made of it. Here a part of a tensor is mapped at a time, and goes when it has been read.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from transformer.storage.buffers import buffer

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in the library
_PART = 2**20  # numbers of a tensor that are mapped at a time
_PICKLES = (b"\x80", b"PK\x03\x04")  # how files of PyTorch begin


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, the offset in it, and what it is."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, dtype: np.dtype | None = None) -> np.ndarray:
        """The tensor in another type; None: in its own."""
        made = buffer(self.shape, self.dtype if dtype is None else dtype)
        numbers = made.reshape(-1)
        for n in range(0, numbers.size, _PART):
            part = numbers[n : n + _PART]
            at = self.offset + n * self.dtype.itemsize
            part[:] = np.memmap(self.path, self.dtype, "r", at, part.shape)
        return made


def read_header(path: str | os.PathLike) -> dict[str, Stored]:
    """Reads which tensors a file holds.

    Raises:
      ValueError: the file is not one of safetensors, or is damaged; says what is wrong.
      OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        fits = len(start) == 8 and length <= min(size - 8, _LONGEST_HEADER)
        if not fits and start.startswith(_PICKLES):
            raise ValueError(
                f"{path} is a pickle, PyTorch's format, which can run code when it is read; it is "
                "not loaded. Save the model as safetensors."
            )
        if not fits:
            raise _damaged(path, f"its header of {length} bytes does not fit its {size} bytes")
        header = file.read(length)
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON in UTF-8: {error}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not an object")
    entries.pop("__metadata__", None)
    start = 8 + length
    stored = {name: _stored(path, start, name, entry) for name, entry in entries.items()}
    _require_whole(path, start, size, stored)
    return stored


def _stored(path, start, name, entry):
    try:
        dtype, shape, (begin, end) = (entry[k] for k in ("dtype", "shape", "data_offsets"))
        sizes = [begin, end, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(
            path, f"tensor {name!r} is not described by dtype, shape and data_offsets"
        ) from error
    if not all(type(x) is int and 0 <= x < 2**63 for x in sizes):
        raise _damaged(path, f"tensor {name!r} has sizes or offsets that are not whole numbers")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"tensor {name!r} is of type {dtype!r}, which is not known")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _damaged(
            path,
            f"tensor {name!r} of type {dtype} and shape {str(shape)[:80]} does not have the "
            f"{end - begin} bytes between its offsets",
        )
    return Stored(path, start + begin, tuple(shape), DTYPES[dtype])


def _require_whole(path, start, size, stored):
    """Refuses tensors that overlap, that leave gaps, or that the file does not hold."""
    end = start
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, _bytes(item[1]))):
        if tensor.offset != end:
            raise _damaged(path, f"tensor {name!r} does not begin where the one before it ends")
        end += _bytes(tensor)
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, and the file at byte {size}")


def _bytes(tensor):
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _without_repeats(pairs):
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _damaged(path, why):
    return ValueError(f"{path} is damaged, or not a file of safetensors: {why}.")


def write(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterator[np.ndarray],
) -> None:
    """Writes a file, tensor by tensor.

    Args:
      path: where to.
      shapes: the shape and type of each tensor.
      tensors: the tensors, in that order.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at multiples of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            np.ascontiguousarray(tensor).tofile(file)
        file.flush()
        os.fsync(file.fileno())
