"""Attention over latent vectors, from which keys and values of all heads are made."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from kernels import write_read as kernel
from kernels.blocks import Blocks
from kernels.cells import write_one
from kernels.exact.products import batched
from kernels.exact.sums import rounded
from kernels.operands import Shared
from kernels.options import Options
from transformer.axes import split_queries
from transformer.memory.memory import Memory, where


@dataclass(frozen=True)
class Latent(Memory):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    A cell is [R + P]: a latent vector of R numbers, and a key of P numbers that carries the
    position and that all heads share. A query is (q [N, H], q_position [N, P]). `shared` are the
    matrices (key [R, N, H], value [R, N, Hv]) that make a head's key and value from the latent
    vector. What is read is [N, Hv].

    The scores are scale * (q . (latent @ key) + q_position . position key). There are two ways to
    compute them, of equal meaning: to make the keys and values of all cells, which is what many
    tokens at once do; or to take the matrices into the query and into what was read ("absorbed"),
    so that the cells are read as they lie, which few tokens do.

    A block is [1, S, R + P], S the capacity.

    Attributes:
      rank: R.
      scale: the factor on the scores, above 0; None: 1 / sqrt(H + P).
      soft_cap: cap * tanh(score / cap) on the scaled scores; None: off.
      backend, exact: as in `Softmax`. Exact reads take the second way always.
    """

    rank: int
    scale: float | None = None
    soft_cap: float | None = None
    backend: str = "auto"
    exact: bool = False

    def empty(self, capacity, cell):
        """Returns latent vectors of zeros."""
        return jnp.zeros((1, capacity, *cell.shape), cell.dtype)

    def step(self, block, i, cell, query, shared):
        """Writes the latent vector at i, and reads by the formula."""
        at = jnp.maximum(i, 0)
        new = jnp.where(i >= 0, cell.astype(block.dtype), block[0, at])
        block = jax.lax.dynamic_update_index_in_dim(block, new[None], at, 1)
        q, q_position = query
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        latent, position = jnp.split(block[0].astype(dtype), [self.rank], axis=1)
        key, value = (jnp.einsum("sr,rnh->snh", latent, x.astype(dtype)) for x in shared)
        scores = jnp.einsum("nh,snh->ns", q.astype(dtype), key, precision="highest")
        scores += jnp.einsum("np,sp->ns", q_position.astype(dtype), position, precision="highest")
        scores *= self._options(query).scale
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        visible = jnp.arange(block.shape[1], dtype=jnp.int32) <= jnp.maximum(i, 0)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        z = jnp.einsum("ns,snh->nh", weights, value, precision="highest")
        return block, where(i >= 0, z.astype(q.dtype), 0)

    def depth(self, length):
        """All tokens read at once."""
        return 1

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence, by the kernel."""
        one = lambda tree: jax.tree.map(lambda x: x[None], tree)
        block, z = self.rows(one(block), i[None], one(cells), one(queries), shared)
        return block[0], z[0]

    def rows(self, block, i, cells, queries, shared):
        """T tokens of B sequences, by the kernel."""
        return self._chunk(block, i, cells, queries, shared, packed=False)

    def documents(self, capacity, block, i, cells, queries, shared):
        """T tokens of B rows of packed documents, by the kernel."""
        return self._chunk(block, i, cells, queries, shared, packed=True)

    def in_place(self, blocks: Blocks, i, cells, queries, shared):
        """One token of each sequence; one cell changes, and the read is where the cells lie."""
        written = write_one(blocks, i[:, 0], cells[:, :, None])
        # Without the barrier XLA fuses the write into each of its uses: a copy for each.
        written = jax.lax.optimization_barrier(written)
        z = self.read_in_place(replace(blocks, arrays=written), i, queries, shared)
        return written, z

    def read_in_place(self, blocks: Blocks, i, queries, shared):
        """One token of each sequence reads where the cells lie: the latent vectors are keys, and
        their first R numbers the values."""
        both = replace(blocks, arrays=(blocks.arrays, blocks.arrays))
        q = self._absorbed(queries, shared[0])
        options = self._options(queries)
        z = kernel.read(both, i, q, Shared(), options=options, backend=self.backend)
        return self._values(z, shared[1])

    def _chunk(self, block, i, cells, queries, shared, packed):
        key, value = shared
        _, num_heads, head_size = key.shape
        # For each cell and head, making costs R (H + Hv) products once, and absorbing about 2 R
        # more for each query that reads the cell.
        makes_all = 2 * i.shape[1] > head_size + value.shape[2] and not self.exact
        q = jnp.concatenate(queries, -1) if makes_all else self._absorbed(queries, key)

        def keys_values(arrays):
            [block] = arrays
            if not makes_all:
                return block, block
            latent, position = jnp.split(block[:, 0].astype(q.dtype), [self.rank], axis=-1)
            made = lambda x: jnp.einsum("bsr,rnh->bnsh", latent, x.astype(q.dtype))
            spread = jnp.broadcast_to(
                position[:, None], (len(block), num_heads, *position.shape[1:])
            )
            return jnp.concatenate([made(key), spread], -1), made(value)

        [block], z = kernel.chunk(
            (block,),
            i,
            (cells[:, :, None],),
            q,
            Shared(),
            options=self._options(queries),
            packed=packed,
            backend=self.backend,
            split=split_queries,
            keys_values=keys_values,
        )
        return block, z if makes_all else self._values(z, value)

    def _absorbed(self, queries, key):
        """Queries on the cells as they lie: (q [B, T, N, H], [B, T, N, P]) -> [B, T, N, R + P]."""
        q, q_position = queries
        return jnp.concatenate([self._of_heads("btnh,rnh->btnr", q, key), q_position], -1)

    def _values(self, z, value):
        """Means of cells become values: [B, T, N, R + P] -> [B, T, N, Hv]."""
        return self._of_heads("btnr,rnh->btnh", z[..., : self.rank], value)

    def _of_heads(self, subscripts, x, matrices):
        """x [B, T, N, ...] times the matrix of each head: [R, N, H], or its transpose."""
        if not self.exact:
            return jnp.einsum(subscripts, x, matrices.astype(x.dtype))
        B, T, N, size = x.shape
        wide = jnp.promote_types(x.dtype, jnp.float32)
        rows = x.astype(wide).swapaxes(0, 2).reshape(N, T * B, size)
        by_head = rounded(matrices.astype(x.dtype)).astype(wide).swapaxes(0, 1)
        y = batched(rows, by_head, subscripts.startswith("btnh"))
        return rounded(y.reshape(N, T, B, -1).swapaxes(0, 2).astype(x.dtype))

    def _options(self, query):
        size = query[0].shape[-1] + query[1].shape[-1]
        return Options(
            size**-0.5 if self.scale is None else self.scale, None, self.soft_cap, self.exact
        )
