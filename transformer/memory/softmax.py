"""Attention: keys and values under a softmax, read by the fused kernels."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import write_read as kernel
from kernels.blocks import Blocks
from kernels.operands import Shared
from kernels.options import Options
from transformer.axes import split_queries
from transformer.memory.memory import Memory


@dataclass(frozen=True)
class Softmax(Memory):
    """Attention (arXiv:1706.03762) over the keys and values of the positions up to the token's own.

    A cell is a pair (k [K, H], v [K, Hv]); a query is [N, H] with N a multiple of K, as N / K query
    heads share one key head; what is read is [N, Hv]. `shared` is None, or sinks [N]: learned
    logits that join the denominator.

    A block is (keys [K, S, H], values [K, S, Hv]), S the capacity. With a window smaller than the
    capacity it is a ring of `window` cells, in which position p lies in cell p % window.

    Attributes:
      scale: the factor on q.k, above 0; None: 1 / sqrt(H).
      window: how many positions a token sees, its own included; None: all.
      soft_cap: cap * tanh(score / cap) on the scaled scores; None: off.
      slopes: of ALiBi (arXiv:2108.12409), one for each of the N query heads; None: none.
      backend: what runs it, one of `kernels.backends.choice.BACKENDS`, or "auto".
      exact: whether what a token reads has the same bits however it runs.
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    backend: str = "auto"
    exact: bool = False

    def empty(self, capacity, cell):
        """Returns keys and values of zeros, in the dtypes of the cell."""
        if not (isinstance(cell, tuple | list) and len(cell) == 2 and _fit(*cell)):
            raise ValueError(
                "a cell of Softmax is a pair (k [K, H], v [K, Hv]) with the same K, and this one "
                f"has {jax.tree.map(lambda x: x.shape, cell)}."
            )
        size = capacity if self.window is None else min(self.window, capacity)
        make = lambda x: jnp.zeros((x.shape[0], size, x.shape[1]), x.dtype)
        return tuple(map(make, cell))

    def step(self, block, i, cell, query, shared):
        """Writes k and v at i, and reads by the formula, which kernels are held to."""
        K, size, H = block[0].shape
        if query.ndim != 2 or query.shape[1] != H or query.shape[0] % K:
            raise ValueError(
                f"a query of Softmax is [N, H={H}] with N a multiple of K={K}, as its cells are "
                f"k [K, H] and v [K, Hv]; this one has the shape {list(query.shape)}."
            )
        slot = i % size
        write = lambda x, new: x.at[:, slot].set(jnp.where(i >= 0, new.astype(x.dtype), x[:, slot]))
        keys, values = map(write, block, cell)
        # The position that each cell holds: the newest up to i that falls on it.
        positions = i - (i - jnp.arange(size, dtype=jnp.int32)) % size
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        q = query.astype(dtype).reshape(K, -1, query.shape[-1])
        scores = jnp.einsum("kgh,ksh->kgs", q, keys.astype(dtype), precision="highest")
        scores = scores * self._options(query).scale
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if self.slopes is not None:
            slopes = jnp.asarray(self.slopes, dtype).reshape(K, -1, 1)
            scores = scores - slopes * (i - positions).astype(dtype)
        visible = (positions >= 0) & (i >= 0)
        if self.window is not None:
            visible &= i - positions < self.window
        scores = jnp.where(visible, scores, -jnp.inf)
        if shared is not None:
            sinks = jnp.broadcast_to(shared.astype(dtype).reshape(K, -1, 1), (*scores.shape[:2], 1))
            scores = jnp.concatenate([scores, sinks], axis=-1)
        # A token sees its own cell at least; padding sees nothing, and must not make a nan.
        weights = jax.nn.softmax(jnp.where(i >= 0, scores, 0))[..., :size]
        z = jnp.einsum("kgs,ksh->kgh", weights, values.astype(dtype), precision="highest")
        z = jnp.where(i >= 0, z, 0)
        return (keys, values), z.reshape(query.shape[0], -1).astype(query.dtype)

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence, by the kernel."""
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        block, z = self.rows(one(block), i[None], one(cells), queries[None], shared)
        return jax.tree.map(lambda x: x[0], block), z[0]

    def rows(self, block, i, cells, queries, shared):
        """T tokens of B sequences, by the kernel."""
        return self._chunk(block, i, cells, queries, shared, packed=False)

    def documents(self, capacity, block, i, cells, queries, shared):
        """T tokens of B rows of packed documents, by the kernel."""
        return self._chunk(block, i, cells, queries, shared, packed=True)

    def in_place(self, blocks: Blocks, i, cells, queries, shared):
        """One token of each sequence; one cell changes, and the read is where the cells lie."""
        try:
            return kernel.decode(
                blocks,
                i,
                cells,
                queries,
                self._shared(shared, queries),
                options=self._options(queries),
                backend=self.backend,
            )
        except NotImplementedError:  # the backend has no such way
            return super().in_place(blocks, i, cells, queries, shared)

    def read_in_place(self, blocks: Blocks, i, queries, shared):
        """One token of each sequence reads where the cells lie."""
        return kernel.read(
            blocks,
            i,
            queries,
            self._shared(shared, queries),
            options=self._options(queries),
            backend=self.backend,
        )

    def _chunk(self, block, i, cells, queries, shared, packed):
        return kernel.chunk(
            block,
            i,
            cells,
            queries,
            self._shared(shared, queries),
            options=self._options(queries),
            packed=packed,
            backend=self.backend,
            split=split_queries,
        )

    def _shared(self, sinks, queries):
        dtype = jnp.promote_types(queries.dtype, jnp.float32)
        slopes = None if self.slopes is None else jnp.asarray(self.slopes, dtype)
        return Shared(sinks, slopes)

    def _options(self, query):
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return Options(scale, self.window, self.soft_cap, self.exact)


def _fit(k, v):
    return len(k.shape) == len(v.shape) == 2 and k.shape[0] == v.shape[0]
