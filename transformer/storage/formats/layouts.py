"""How published tensors become parameters and back: transposed, split, stacked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from transformer.config import Config

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Layout:
    """A way from some published arrays to some parameters, and back.

    Attributes:
      read: read(config, published) -> parameters.
      write: write(config, parameters) -> published.
    """

    read: Callable[[Config, Arrays], Arrays]
    write: Callable[[Config, Arrays], Arrays]


def _both(function):
    return Layout(function, function)


def each(read: Callable, write: Callable | None = None) -> Layout:
    """A layout of arrays one by one; `write` None: the function is its own inverse."""
    write = write or read
    return Layout(
        lambda _, arrays: [read(x) for x in arrays], lambda _, arrays: [write(x) for x in arrays]
    )


SAME = each(lambda x: x)
# Published matrices are [out, in], ours [in, out].
TRANSPOSED = each(lambda x: np.swapaxes(x, -1, -2))
# Gemma's norms multiply by 1 + scale.
PLUS_ONE = each(lambda x: x + 1, lambda x: x - 1)
# OPT's positions begin behind two rows that no token uses.
BEHIND_TWO = each(lambda x: x[2:], lambda x: np.concatenate([np.zeros_like(x[:2]), x]))


def _qkv_sizes(config):
    _, _, _, _, N, K, H, _ = config.shape
    return [N * H, K * H, K * H]


def _split(sizes, axis, then=lambda x: x):
    def read(config, arrays):
        [x] = arrays
        cuts = np.cumsum(sizes(config))[:-1]
        return [then(part) for part in np.split(x, cuts, axis)]

    return Layout(read, lambda _, arrays: [np.concatenate([then(x) for x in arrays], axis)])


_turned = lambda x: np.swapaxes(x, -1, -2)
# One published matrix [q + k + v, in], or its bias.
QKV_ROWS = _split(_qkv_sizes, 0, _turned)
QKV_VECTOR = _split(_qkv_sizes, 0)
# The same in GPT-2, whose matrices are [in, out].
QKV_COLUMNS = _split(_qkv_sizes, 1)
# Gate and up-projection, one behind the other (Phi-3).
GATE_UP_ROWS = _split(lambda config: [config.shape.F] * 2, 0, _turned)


def _heads_read(config, arrays):
    """[N * 3 * H, ...], the q, k and v of each head together (GPT-NeoX), -> q, k and v."""
    [x] = arrays
    N, H = config.shape.N, config.shape.H
    parts = x.reshape(N, 3, H, *x.shape[1:]).swapaxes(0, 1).reshape(3, N * H, *x.shape[1:])
    return [_turned(part) if x.ndim == 2 else part for part in parts]


def _heads_write(config, arrays):
    N, H = config.shape.N, config.shape.H
    parts = np.stack([_turned(x) if x.ndim == 2 else x for x in arrays])
    rest = parts.shape[2:]
    return [parts.reshape(3, N, H, *rest).swapaxes(0, 1).reshape(3 * N * H, *rest)]


QKV_BY_HEAD = Layout(_heads_read, _heads_write)

# A published matrix for each expert.
STACKED = Layout(
    lambda _, arrays: [np.stack([_turned(x) for x in arrays])],
    lambda _, arrays: [_turned(x) for x in arrays[0]],
)
# Gate and up-projection of all experts in turns, in the last axis (gpt-oss).
IN_TURNS = Layout(
    lambda _, arrays: [arrays[0][..., 0::2], arrays[0][..., 1::2]],
    lambda _, arrays: [np.stack(arrays, -1).reshape(*arrays[0].shape[:-1], -1)],
)
