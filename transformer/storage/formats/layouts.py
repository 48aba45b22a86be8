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


def _turned(x):
    """A published matrix [out, in] is [in, out] here; a vector stays as it is."""
    return np.swapaxes(x, -1, -2) if x.ndim > 1 else x


SAME = each(lambda x: x)
TRANSPOSED = each(_turned)
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
    return list(map(_turned, parts))


def _heads_write(config, arrays):
    N, H = config.shape.N, config.shape.H
    parts = np.stack(list(map(_turned, arrays)))
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


def _delta_read(config, arrays):
    """Qwen3-Next's q, k, v and z of each key head together -> channels (q, k, v) and gate (z)."""
    [x] = arrays
    sizes = config.delta_sizes
    M, H = sizes.num_key_heads, sizes.key_size
    values = sizes.num_value_heads // M * sizes.value_size
    parts = np.split(x.reshape(M, -1, x.shape[-1]), np.cumsum([H, H, values]), axis=1)
    q, k, v, z = (part.reshape(-1, x.shape[-1]) for part in parts)
    return [_turned(np.concatenate([q, k, v])), _turned(z)]


def _delta_write(config, arrays):
    channels, gate = map(_turned, arrays)
    sizes = config.delta_sizes
    M, H = sizes.num_key_heads, sizes.key_size
    q, k, v = np.split(channels, [M * H, 2 * M * H])
    parts = [part.reshape(M, -1, channels.shape[-1]) for part in (q, k, v, gate)]
    return [np.concatenate(parts, axis=1).reshape(-1, channels.shape[-1])]


DELTA_CHANNELS = Layout(_delta_read, _delta_write)


def _steps_read(config, arrays):
    """Qwen3-Next's strength and decay of each key head together -> the one and the other."""
    [x] = arrays
    parts = x.reshape(config.delta_sizes.num_key_heads, 2, -1, x.shape[-1]).swapaxes(0, 1)
    return [_turned(part.reshape(-1, x.shape[-1])) for part in parts]


def _steps_write(config, arrays):
    M = config.delta_sizes.num_key_heads
    parts = np.stack([_turned(x).reshape(M, -1, x.shape[0]) for x in arrays], 1)
    return [parts.reshape(-1, parts.shape[-1])]


DELTA_STEPS = Layout(_steps_read, _steps_write)
# A depthwise convolution [C, 1, tokens]; ours is [tokens, C].
CONVOLUTION = each(lambda x: x[:, 0].T, lambda x: x.T[:, None])


def _gated_read(config, arrays):
    """Queries and gates, those of each head together -> queries and gates."""
    [x] = arrays
    parts = x.reshape(config.shape.N, 2, config.shape.H, -1).swapaxes(0, 1)
    return [_turned(part.reshape(-1, *x.shape[1:])) for part in parts]


def _gated_write(config, arrays):
    x = np.stack(list(map(_turned, arrays)))
    parts = x.reshape(2, config.shape.N, config.shape.H, -1)
    return [parts.swapaxes(0, 1).reshape(-1, *x.shape[2:])]


QUERY_AND_GATE = Layout(_gated_read, _gated_write)


def _interleaved(rows, size):
    """The last `size` rows of each head [heads, rows, ...]: pairs side by side, made two halves."""
    kept, turning = rows[:, :-size], rows[:, -size:]
    halves = turning.reshape(len(rows), -1, 2, *rows.shape[2:]).swapaxes(1, 2)
    return np.concatenate([kept, halves.reshape(turning.shape)], 1)


def _paired(rows, size):
    """The inverse of `_interleaved`."""
    kept, turning = rows[:, :-size], rows[:, -size:]
    pairs = turning.reshape(len(rows), 2, -1, *rows.shape[2:]).swapaxes(1, 2)
    return np.concatenate([kept, pairs.reshape(turning.shape)], 1)


def _by_head(turn, heads):
    def read(config, arrays):
        [x] = arrays
        rows = x.reshape(heads(config), -1, *x.shape[1:])
        return [_turned(turn(rows, config.latent.rotary_size).reshape(x.shape))]

    return read


def _by_head_back(turn, heads):
    def write(config, arrays):
        x = _turned(arrays[0])
        rows = x.reshape(heads(config), -1, *x.shape[1:])
        return [turn(rows, config.latent.rotary_size).reshape(x.shape)]

    return write


# DeepSeek's matrices whose last rows, of each head or of all of it, turn in pairs side by side.
LATENT_QUERY, LATENT_DOWN = (
    Layout(_by_head(_interleaved, heads), _by_head_back(_paired, heads))
    for heads in (lambda config: config.num_heads, lambda config: 1)
)


def _key_value_read(config, arrays):
    """Keys and values of each head together [N * (H + Hv), R] -> keys and values."""
    [x] = arrays
    rows = x.reshape(config.num_heads, -1, x.shape[-1])
    parts = rows[:, : config.shape.H], rows[:, config.shape.H :]
    return [_turned(part.reshape(-1, x.shape[-1])) for part in parts]


def _key_value_write(config, arrays):
    rows = [_turned(x).reshape(config.num_heads, -1, x.shape[0]) for x in arrays]
    return [np.concatenate(rows, 1).reshape(-1, rows[0].shape[-1])]


KEY_VALUE_BY_HEAD = Layout(_key_value_read, _key_value_write)
