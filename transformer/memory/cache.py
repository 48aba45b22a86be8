"""The cache: an ordered tuple of blocks, one per layer, that only `write_read` touches.

A program goes through the blocks in order and calls the instruction once for each. `begin` and
`end` mark one token; what breaks the rule is an error while the program is traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kernels.options import Options
from transformer.memory.instruction import OPERANDS, write_read_p

RULE = "A program calls write_read exactly once for each block, in order."


class ProgramError(Exception):
    """A program that breaks the rules of the cache."""


@struct.dataclass
class Block:
    """The memory of one layer: a key and a value per position.

    keys, values: [K, S, H]; or [R, K, S, H] for R layers whose blocks share one array.
    A block of `window` cells is a ring, where position p lives in cell p % window.
    """

    keys: jax.Array
    values: jax.Array


@struct.dataclass
class Cache:
    """The blocks of one sequence. Immutable: `write_read` returns a new cache.

    blocks: one `Block` per layer; or, where the layers are scanned, one per layer of the repeated
      pattern, each holding all repeats.
    capacity: cells of a block that is no ring, so also the number of positions that fit.
    repeat: which repeat of the pattern is running, where the layers are scanned.
    cell: the cell of the running token, where it differs from its position (packed documents).
    next: the block that the next `write_read` touches; None between tokens.
    backend: what runs the instruction, one of `kernels.backends.choice.BACKENDS` or "auto".
    """

    blocks: tuple[Block, ...]
    capacity: int = struct.field(pytree_node=False)
    repeat: jax.Array | None = None
    cell: jax.Array | None = None
    next: int | None = struct.field(pytree_node=False, default=None)
    backend: str = struct.field(pytree_node=False, default="auto")

    def begin(
        self,
        cell: jax.Array | None = None,
        repeat: jax.Array | None = None,
        backend: str = "auto",
    ) -> Cache:
        """Starts a token, or one repeat of the pattern of layers.

        Args:
          cell: scalar int32, where the token's cells lie; None: at its position. Where documents
            are packed in one row, a document at cells c, c + 1, ... has positions 0, 1, ...
          repeat: scalar int32, which of the stacked blocks to use; None where none are stacked.
          backend: what runs the instruction for this token.

        Raises:
          ProgramError: the token before has not ended.
        """
        if self.next is not None:
            raise ProgramError(
                f"a token begins while another is at block {self.next} of {len(self.blocks)}; "
                f"end it with cache.end(). {RULE}"
            )
        return self.replace(next=0, cell=cell, repeat=repeat, backend=backend)

    def end(self) -> Cache:
        """Ends a token, or one repeat of the pattern of layers.

        Raises:
          ProgramError: some blocks were not used.
        """
        if self.next is None:
            raise ProgramError("cache.end() without cache.begin().")
        if self.next != len(self.blocks):
            raise ProgramError(
                f"the program ended after {self.next} of {len(self.blocks)} blocks: "
                f"write_read was not called for block {self.next}. {RULE}"
            )
        return self.replace(next=None, cell=None, repeat=None, backend="auto")

    def check_token(self, before: Cache) -> None:
        """Checks that one whole token has run since `before`, under the same trace.

        Raises:
          ProgramError: the token has not ended, or no block was used.
        """
        if self.next is not None:
            raise ProgramError(
                f"the program returned a cache at block {self.next} of {len(self.blocks)}; "
                f"end the token with cache.end(). {RULE}"
            )
        for index, (old, new) in enumerate(zip(before.blocks, self.blocks, strict=True)):
            if new.keys is old.keys:
                raise ProgramError(
                    f"the program returned a cache in which block {index} is as it was: "
                    f"write_read was not called for it. {RULE}"
                )

    def write_read(
        self,
        i: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q: jax.Array,
        *,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: jax.Array | None = None,
        alibi: jax.Array | None = None,
    ) -> tuple[Cache, jax.Array]:
        """The instruction: writes cell i of the next block, then reads cells 0..i of it.

        Args:
          i: scalar int32, the token's position; -1 marks padding, which writes and reads nothing.
          k, v: [K, H], the token's cell.
          q: [N, H], N a multiple of K.
          window, scale, soft_cap, sinks, alibi: as in `kernels.attention`.

        Returns:
          The cache with the cell written, and what was read, z [N, H].

        Raises:
          ProgramError: all blocks have been used, or no token has begun.
          ValueError: k, v or q do not fit the block.
        """
        if self.next is None:
            raise ProgramError(f"write_read outside of a token: call cache.begin() first. {RULE}")
        if self.next == len(self.blocks):
            raise ProgramError(
                f"write_read was called a {self.next + 1}th time, and the cache has "
                f"{len(self.blocks)} blocks. {RULE}"
            )
        block = self.blocks[self.next]
        self._check(block, k, v, q)
        i = jnp.asarray(i, jnp.int32)
        cell = i if self.cell is None else jnp.asarray(self.cell, jnp.int32)
        given = {
            "keys": block.keys,
            "values": block.values,
            "layer": self.repeat,
            "cells": cell[None, None],
            "k": k[None, None],
            "v": v[None, None],
            "q": q[None, None],
            "starts": None if self.cell is None else (cell - i)[None, None],
            "sinks": sinks,
            "alibi": alibi,
        }
        names = tuple(name for name in OPERANDS if given[name] is not None)
        keys, values, z = write_read_p.bind(
            *(given[name] for name in names),
            names=names,
            chunked=False,
            options=Options(q.shape[-1] ** -0.5 if scale is None else scale, window, soft_cap),
            backend=self.backend,
        )
        blocks = list(self.blocks)
        blocks[self.next] = Block(keys, values)
        return self.replace(blocks=tuple(blocks), next=self.next + 1), z[0, 0]

    def _check(self, block, k, v, q):
        num_heads, head_size = block.keys.shape[-3], block.keys.shape[-1]
        fits = k.shape == v.shape == (num_heads, head_size)
        if not fits or q.shape[1:] != (head_size,) or q.shape[0] % num_heads:
            raise ValueError(
                f"block {self.next} holds cells [K={num_heads}, H={head_size}]; write_read takes "
                f"k, v [K, H] and q [N, H] with N a multiple of K, and got k {k.shape}, "
                f"v {v.shape}, q {q.shape}."
            )
