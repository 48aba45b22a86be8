"""The Jacobian lens: what the later layers make of a stream, to first order and on average."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from transformer.insight.intervene import Intervened, intervene
from transformer.insight.lens import TunedLens
from transformer.insight.residual import config_of
from transformer.memory.instruction import POSITIONS
from transformer.program.init import init_cache
from transformer.program.layers import KINDS, layer
from transformer.program.params import Params, unscanned
from transformer.program.program import embed
from transformer.program.spec import layer_specs

AT_ONCE = 8  # rows of a Jacobian, since parameters are read once for all


def jacobian(f, params: Params, sequences: Sequence) -> TunedLens:
    """Makes a lens of derivatives: how the stream after each layer moves that after the last one.

    The derivative goes through all later layers and their cells, to the same token and to later
    ones: summed over those, and averaged over the tokens it starts from. Nothing is trained. It
    takes `width` backward passes for each sequence.

    Args:
      f: a program made by `program`, or one under edits.
      params: its parameters.
      sequences: [B, T] int, tokens that derivatives are averaged over.

    Returns:
      A lens for `lens`, whose biases are zeros.
    """
    sequences = jnp.asarray(np.asarray(sequences), jnp.int32)
    total = sum(_summed(f, params, tokens) for tokens in sequences)
    matrices = total / sequences.size - jnp.eye(total.shape[-1], dtype=total.dtype)
    return TunedLens(matrices, jnp.zeros(matrices.shape[:2], matrices.dtype))


@partial(jax.jit, static_argnums=0)
def _summed(f, params, tokens):
    """Derivatives of the last stream by each, summed over tokens: [L, E, E], of row by column."""
    config, params = unscanned(config_of(f), params)
    specs = layer_specs(config, KINDS, f.attention, f.numerics)

    def one(params, cache, given, i):
        """The program as a function of what is added to the stream after each layer, [L, E]."""
        token, more = given
        turn = cache.begin(i)
        x = embed(f, params, token, turn.i)
        for spec, layer_params, added in zip(specs, params.layers, more, strict=True):
            turn, x = layer(spec, layer_params, turn, x)
            x = x + added
        return turn.end(), x

    g = intervene(one, f.edits) if isinstance(f, Intervened) else one
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    over = jax.vmap(g, (None, None, (0, 1), 0), (None, 0), axis_name=POSITIONS)
    last = lambda more: over(params, init_cache(config, len(tokens)), (tokens, more), positions)[1]
    still = jnp.zeros((config.num_layers, len(tokens), config.width), config.compute_dtype)
    back = jax.vjp(last, still)[1]
    row = lambda n: back(jnp.zeros(still.shape[1:], still.dtype).at[:, n].set(1))[0].sum(1)
    rows = jax.lax.map(row, jnp.arange(config.width), batch_size=AT_ONCE)  # [E out, L, E in]
    return rows.transpose(1, 2, 0)
