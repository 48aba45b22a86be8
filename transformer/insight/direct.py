"""A logit as the sum of what went into it directly.

A token's logits are a linear function of what the sublayers added to its residual stream, once the
norms are frozen: divided by the same number as in the run. What attention added is a sum over the
cells that it read, once the softmax is frozen. So a logit is the sum of the direct contributions of
the embedding, of each cell by each head, of the feed-forward networks and of biases.
"""

import jax
import jax.numpy as jnp
from flax import struct

from transformer.insight.positions import token_index
from transformer.insight.residual import Place, config_of, places, stream
from transformer.insight.trace import Trace, attention, by_position
from transformer.memory.latent import Latent
from transformer.memory.softmax import Softmax
from transformer.program.layers import KINDS
from transformer.program.params import Params


@struct.dataclass
class Direct:
    """What went directly into one number made of a token's logits, before a soft cap.

    Attributes:
      embedding: of the token's own embedding.
      cells: for each layer [N, S], of each cell by each query head; for a layer of the delta rule
        None, since what it reads goes through a gate and a norm of its own: see `contributions`.
      mixers: [L], of what each layer read: the sum over its cells, and the bias of its output.
      feed_forwards: [L].
      biases: of the norms.
      total: the number itself, the sum of all but `cells`, which are part of `mixers`.
    """

    embedding: jax.Array
    cells: tuple
    mixers: jax.Array
    feed_forwards: jax.Array
    biases: jax.Array
    total: jax.Array


def direct(f, params: Params, trace: Trace, position: int, direction) -> Direct:
    """Direct logit attribution, per sublayer, head and cell (frozen softmax and norms).

    Args:
      f, params, trace: as in `stream`.
      position: which token of the trace, as an index into T.
      direction: the number that is taken apart: a token id, for its logit, or [V] weights of the
        logits, as of a difference of two.

    Raises:
      TypeError: f was not made by `program`.
      ValueError: there is no such token.
    """
    config, found, made = config_of(f), list(places(f, params, trace)), stream(f, params, trace)
    position = token_index(position, len(trace.tokens))
    if jnp.ndim(direction) == 0:
        direction = jax.nn.one_hot(direction, params.vocab_size)
    norms = [(x.params.mixer_post_norm, x.params.feed_forward_post_norm) for x in found]
    bias = lambda norm: None if norm is None else norm.bias
    biases = [tuple(map(bias, pair)) for pair in norms], bias(params.final_norm)

    def number(embedding, mixers, feed_forwards, biases):
        """The number, linear in all operands together: gradients times operands sum up to it."""
        x = embedding
        for pair, pair_biases, *parts in zip(norms, biases[0], mixers, feed_forwards, strict=True):
            for norm, bias, y in zip(pair, pair_biases, parts, strict=True):
                if config.norm_placement == "post":
                    x = _frozen(config, norm, bias, x + y)
                else:
                    x = x + _frozen(config, norm, bias, y)
        x = _frozen(config, params.final_norm, biases[1], x)
        matrix = params.embedding.T if params.output is None else params.output.weight
        back = matrix @ direction
        if params.embedding_out is not None:
            back = params.embedding_out.weight @ back
        return x @ back

    operands = made.embedding[position], made.mixers[:, position], made.feed_forwards[:, position]
    total, slopes = jax.value_and_grad(number, (0, 1, 2, 3))(*operands, biases)
    of_biases = jax.tree.leaves(jax.tree.map(jnp.vdot, slopes[3], biases))
    return Direct(
        embedding=slopes[0] @ operands[0],
        cells=tuple(_cells(x, trace, position, d) for x, d in zip(found, slopes[1], strict=True)),
        mixers=(slopes[1] * operands[1]).sum(-1),
        feed_forwards=(slopes[2] * operands[2]).sum(-1),
        biases=sum(of_biases, jnp.zeros(())),
        total=total,
    )


def _frozen(config, norm, bias, x):
    """`linear.norm`, by the scale of this x: a linear function of x and the bias."""
    if norm is None:
        return x
    x = x - x.mean() if config.norm == "layer" else x
    scale = jax.lax.rsqrt(jnp.square(x).mean() + config.norm_epsilon)
    y = x * jax.lax.stop_gradient(scale) * norm.scale
    return y if bias is None else y + bias


def _cells(place: Place, trace: Trace, position, slope):
    """Of each cell by each head, given the slope [E] of what the layer gives: [N, S], or None."""
    reading = place.readings[-1]
    if not isinstance(reading.memory, Softmax | Latent):
        return None
    output = lambda z: KINDS[place.spec.kind].output(place.spec, place.params.mixer, z)
    [dz] = jax.vjp(output, reading.z[position])[1](slope)
    near, of, weights = attention(reading, trace.positions, [position])
    by_head = jnp.einsum("snh,nh->ns", of.v, dz, precision="highest")
    return by_position(near, weights[0] * by_head, trace.length)
