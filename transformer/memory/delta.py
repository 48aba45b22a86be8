"""The gated delta rule: a state that forgets, and corrects what it holds under a key."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import delta_chunks, delta_rule
from transformer.axes import split_heads
from transformer.memory.memory import Memory, over_rows


@dataclass(frozen=True)
class DeltaRule(Memory):
    """Gated DeltaNet (arXiv:2412.06464, equation 10).

    A cell is (k [N, Hk], v [N, Hv], log_decay [N], strength [N]), with log_decay at most 0 and
    strength in [0, 1]; a query is [N, Hk]; what is read is [N, Hv]. The state of a head, S
    [Hk, Hv], decays by exp(log_decay), and then strength * k (v - k S) is added to it. What is read
    is q S.

    A block is the state [N, Hk, Hv], in float32 at least.

    Attributes:
      exact: whether a token's bits are the same however it runs. Tokens then follow one another
        everywhere, which takes far longer for many where no kernel runs them.
    """

    exact: bool = False

    def empty(self, capacity, cell):
        """Returns a state of zeros."""
        k, v, *_ = cell
        dtype = jnp.promote_types(k.dtype, jnp.float32)
        return jnp.zeros((*k.shape, v.shape[1]), dtype)

    def step(self, block, i, cell, query, shared):
        """Decays and corrects the state, and reads."""
        many = jax.tree.map(lambda x: x[None], (i, cell, query))
        block, z = self.chunk(block, *many, shared)
        return block, z[0]

    def chunk(self, block, i, cells, queries, shared):
        """T tokens of one sequence, one after the other or in pieces, whichever is faster."""
        return delta_rule.run(block, i, queries, *cells, self.exact)

    def gather(self, cells, queries):
        """Nothing: a head's tokens follow one another, and come together in `rows`."""
        return cells, queries

    def depth(self, length):
        """Pieces follow each other where they run as products; tokens where they are exact."""
        if self.exact:
            return length
        return -(-length // delta_chunks.CHUNK)

    def rows(self, block, i, cells, queries, shared):
        """`chunk` for B sequences, on each device for its own heads."""
        heads = lambda *operands: over_rows(self.chunk, *operands, shared)
        return split_heads(heads, *queries.shape[1:3])(block, i, cells, queries)

    def documents(self, capacity, block, i, cells, queries, shared):
        """As `rows`: a state begins again at position 0."""
        return self.rows(block, i, cells, queries, shared)

    def in_place(self, blocks, i, cells, queries, shared):
        """One token of each sequence, by the kernel where there is one: no state is copied."""
        if not delta_rule.has_kernel_for(blocks.arrays.dtype):
            return super().in_place(blocks, i, cells, queries, shared)
        i = jnp.broadcast_to(i, queries.shape[:2])
        return delta_rule.in_place(blocks, i, queries, *cells)
