"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 numbers of 4 bits with one exponent."""

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from transformer.storage.buffers import buffer

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_BYTES = 16  # of a block


@dataclass(frozen=True)
class Packed:
    """A tensor [X, in, out] that is stored as blocks [X, out, G, 16] and exponents [X, out, G]."""

    name: str
    blocks: object
    scales: object
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        experts, rows, groups, _ = self.blocks.shape
        return experts, groups * 2 * _BYTES, rows

    def read(self, dtype: np.dtype | None = None) -> np.ndarray:
        """The numbers in a type; None: bfloat16, which holds them exactly."""
        made = buffer(self.shape, self.dtype if dtype is None else dtype)
        for x, (blocks, scales) in enumerate(
            zip(self.blocks.read(), self.scales.read(), strict=True)
        ):
            pairs = np.stack([_VALUES[blocks & 15], _VALUES[blocks >> 4]], -1)
            values = np.ldexp(pairs, scales.astype(np.int32)[..., None, None] - 127)
            made[x] = values.reshape(len(blocks), -1).T
        return made


def unpacked(tensors: Mapping) -> dict:
    """Tensors by their names, where each pair of blocks and scales is one tensor.

    Raises:
      ValueError: such a pair is not whole, or not of the right shapes.
    """
    names = [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]
    left = dict(tensors)
    for name in names:
        blocks, scales = left.pop(f"{name}_blocks"), left.pop(f"{name}_scales", None)
        fits = scales is not None and len(blocks.shape) == 4 and blocks.shape[3] == _BYTES
        bytes_ = fits and blocks.dtype == scales.dtype == np.uint8
        if not bytes_ or scales.shape != blocks.shape[:3]:
            raise ValueError(
                f"tensor {name}_blocks and its scales are not MXFP4: blocks must be bytes "
                "[X, out, G, 16], and scales bytes [X, out, G]."
            )
        left[name] = Packed(name, blocks, scales)
    return left
