"""What is drawn at one position, and what is told about it."""

from dataclasses import dataclass

import jax
from flax import struct

from transformer.inference.adjust import Adjustments, Written
from transformer.inference.sampling import Sampling, kept, sample, truncated
from transformer.numerics.numerics import Numerics


@dataclass(frozen=True)
class Wanted:
    """What is told beside a token and its log-probability.

    Attributes:
      top: how many of the most likely tokens.
      truncated: whether the distribution drawn from is.
    """

    top: int = 0
    truncated: bool = False


@struct.dataclass
class Drawn:
    """A token that was drawn; a tree of arrays, with leading axes where it is of many.

    token: int32. logprob: float32, the model's own.
    top: the most likely ids [top] and their log-probabilities, or None.
    truncated: the log-probability in the distribution that was drawn from, and which tokens that
    kept, [V] bool; or None.
    """

    token: jax.Array
    logprob: jax.Array
    top: tuple[jax.Array, jax.Array] | None = None
    truncated: tuple[jax.Array, jax.Array] | None = None

    def at(self, *place: int) -> "Drawn":
        """One of many, at a place along the leading axes."""
        return jax.tree.map(lambda x: x[place], self)


def draw_token(
    key: jax.Array,
    logits: jax.Array,
    written: Written | None,
    sampling: Sampling,
    adjust: Adjustments,
    numerics: Numerics,
    wanted: Wanted,
) -> Drawn:
    """Draws a token from logits [V], as `inference.sampling.sample` does.

    Args:
      key: a random key.
      logits: [V] float32, the model's.
      written: the sequence so far, where logits depend on it.
      sampling, adjust: how tokens are drawn, and what is done to logits before.
      numerics: of the program.
      wanted: what else is told.
    """
    adjusted = adjust(logits, written)
    token, logprob = sample(key, logits, sampling, numerics, adjusted=adjusted)
    top = narrowed = None
    if wanted.top:
        ids = jax.lax.top_k(logits, wanted.top)[1]
        top = ids, jax.vmap(lambda id: -numerics.cross_entropy(logits, id)[0])(ids)
    if wanted.truncated:
        mask = kept(adjusted, sampling, numerics)
        of_kept = truncated(adjusted, mask, sampling.temperature, numerics)
        narrowed = -numerics.cross_entropy(of_kept, token)[0], mask
    return Drawn(token, logprob, top, narrowed)
