"""From logits to a token: small functions of one token's logits [V], to be composed and vmapped.

Temperature and filters are data, not constants of the compiled program: changing them compiles
nothing. A filter that is off costs nothing, as long as `vmap` does not map its parameter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer.checks import whole_number
from transformer.numerics.numerics import FAST, Numerics

NO_LIMIT = np.iinfo(np.int32).max
GROUP = 256
SMALLEST, LARGEST = np.finfo(np.float32).tiny, float(np.finfo(np.float32).max)


@struct.dataclass
class Sampling:
    """How tokens are drawn: scalar arrays, shared by all sequences. Made by `make`.

    temperature: float32; 0 takes the most likely token.
    top_k: int32; vocab_size: int32. NO_LIMIT is off.
    top_p: float32; 1 is off. min_p: float32; 0 is off.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    vocab_size: jax.Array

    @classmethod
    def make(
        cls,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        vocab_size: int | None = None,
    ) -> "Sampling":
        """Checks the parameters, which are as in `inference.options.Options`.

        Args:
          temperature, top_k, top_p, min_p: None turns a filter off.
          vocab_size: at least 1: only ids below it are drawn, where an embedding has rows that no
            token uses; None: all.

        Raises:
          ValueError: a parameter is outside of its range.
          TypeError: a parameter is not a number.
        """
        top_k = NO_LIMIT if top_k is None else whole_number("top_k", top_k, least=1)
        vocab_size = NO_LIMIT if vocab_size is None else whole_number("vocab_size", vocab_size, 1)
        top_p = 1.0 if top_p is None else top_p
        min_p = 0.0 if min_p is None else min_p
        for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
            if not hasattr(value, "__float__"):
                raise TypeError(f"{name}={value!r}; it must be a number.")
        if not 0 <= temperature <= LARGEST:
            raise ValueError(
                f"temperature={temperature}; it must be 0 (the most likely token) or more, and at "
                f"most {LARGEST:.1e}."
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}; it must be above 0 and at most 1, or None.")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p={min_p}; it must be between 0 and 1, or None.")
        return cls(
            np.float32(temperature),
            np.int32(min(top_k, NO_LIMIT)),
            np.float32(max(top_p, SMALLEST)),
            np.float32(min_p),
            np.int32(min(vocab_size, NO_LIMIT)),
        )


def sample(
    key: jax.Array,
    logits: jax.Array,
    sampling: Sampling,
    numerics: Numerics = FAST,
    *,
    adjusted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws a token from what temperature and filters leave.

    The temperature comes first, then each filter sees what the one before it left: top_k, top_p,
    min_p, the order of Hugging Face's transformers.

    Args:
      key: a random key; not used at temperature 0.
      logits: [V] float32.
      sampling: the parameters.
      numerics: in exact numerics the token and its log-probability are the same in any batch.
      adjusted: [V], the logits from which the token is drawn, as `inference.adjust` makes them;
        None: those that came.

    Returns:
      token: int32.
      logprob: float32, the model's own log-probability of the token: log-softmax of the logits as
        they came, before all of that, so that it equals what `score` gives.
    """
    usable = keep_below(logits if adjusted is None else adjusted, sampling.vocab_size)
    token = jax.lax.cond(
        sampling.temperature >= SMALLEST,
        lambda: draw(key, warp(usable, sampling, numerics), numerics),
        lambda: likeliest(usable),
    )
    token = token.astype(jnp.int32)
    return token, -numerics.cross_entropy(logits, token)[0]


def kept(logits: jax.Array, sampling: Sampling, numerics: Numerics = FAST) -> jax.Array:
    """Which tokens `sample` draws from, one at temperature 0: logits [V] -> [V] bool."""
    usable = keep_below(logits, sampling.vocab_size)
    return jax.lax.cond(
        sampling.temperature >= SMALLEST,
        lambda: warp(usable, sampling, numerics) > -jnp.inf,
        lambda: jnp.arange(len(logits)) == likeliest(usable),
    )


def truncated(
    logits: jax.Array, mask: jax.Array, temperature: jax.Array, numerics: Numerics = FAST
) -> jax.Array:
    """Logits [..., V] of the distribution that was drawn from, of which `mask` says the tokens.

    A trainer that gives its own logits and the sampler's mask gets what the sampler would have
    drawn from with the trainer's parameters.
    """
    temperature = jnp.where(temperature >= SMALLEST, temperature, 1)  # one token is left at 0
    return scale(jnp.where(mask, logits, -jnp.inf), temperature, numerics)


def draw(key: jax.Array, logits: jax.Array, numerics: Numerics = FAST) -> jax.Array:
    """A token with probability softmax(logits): the largest of logits plus Gumbel noise, twice.

    First a group of ids is drawn by its total probability, then an id of the group: so V / 256 +
    256 random numbers do for V, which would cost more than the rest of sampling.
    """
    groups = _groups(logits)
    noise = numerics.gumbel(key, (len(groups) + GROUP,))
    group = jnp.argmax(numerics.log_sum_exp(groups) + noise[: len(groups)])
    return group * GROUP + jnp.argmax(groups[group] + noise[len(groups) :])


def likeliest(logits: jax.Array) -> jax.Array:
    """The id of the largest of logits [V], the first of several, or of the first that is nan.

    The largest of each group comes first, which takes a third of the time on a CPU: XLA compares
    numbers together with their places one after the other.
    """
    groups = _groups(logits)
    group = jnp.argmax(groups.max(1))
    return group * GROUP + jnp.argmax(groups[group])


def _groups(logits):
    """Logits [V] as groups of ids, filled up with what is never drawn."""
    padded = jnp.pad(logits, (0, -len(logits) % GROUP), constant_values=-jnp.inf)
    return padded.reshape(-1, GROUP)


def warp(logits: jax.Array, sampling: Sampling, numerics: Numerics = FAST) -> jax.Array:
    """Temperature, then all filters: logits [V] -> [V], -inf where a token is not to be drawn."""
    logits = scale(logits, sampling.temperature, numerics)
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p, numerics)
    return keep_min_p(logits, sampling.min_p, numerics)


def scale(logits: jax.Array, temperature: jax.Array, numerics: Numerics = FAST) -> jax.Array:
    """Logits over temperature (above 0), shifted so that the largest is 0 and none overflows."""
    # Not a division: XLA makes this product of it where the temperature is known, and only there.
    factor = jnp.maximum(1 / temperature, SMALLEST)  # 0 times -inf would be nan
    return numerics.rounded((logits - logits.max(-1, keepdims=True)) * factor)


def keep_below(logits: jax.Array, vocab_size: jax.Array) -> jax.Array:
    """Only ids below `vocab_size`."""
    return jnp.where(jnp.arange(logits.shape[0]) < vocab_size, logits, -jnp.inf)


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """The k most likely tokens, and those that tie with the last of them (arXiv:1805.04833)."""
    enough = lambda kept: kept.sum(dtype=jnp.int32) >= k
    return _keep_likeliest(k < logits.shape[0], logits, enough)


def keep_top_p(logits: jax.Array, p: jax.Array, numerics: Numerics = FAST) -> jax.Array:
    """The fewest tokens whose probability is p or more, with ties: nucleus (arXiv:1904.09751)."""
    probabilities = numerics.softmax(logits)
    mass = lambda kept: numerics.inner(kept.astype(probabilities.dtype), probabilities)
    return _keep_likeliest(p < 1, logits, lambda kept: mass(kept) >= p)


def keep_min_p(logits: jax.Array, p: jax.Array, numerics: Numerics = FAST) -> jax.Array:
    """Tokens at least p times as likely as the most likely one (arXiv:2407.01082)."""
    return jnp.where(logits >= logits.max() + numerics.log(p), logits, -jnp.inf)


def _keep_likeliest(active, logits: jax.Array, enough: Callable) -> jax.Array:
    """Keeps the logits from the largest one down, until `enough(which are kept [V])` holds.

    Float bits, the negative ones reversed and -0 made 0, count like unsigned integers. So the
    threshold is found bit by bit from the highest, in 32 sums over V; a sort costs several times
    more.
    """

    def threshold():
        bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
        ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

        def refine(n, lower):
            higher = lower | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
            return jnp.where(enough(ordered >= higher), higher, lower)

        kept = ordered >= jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
        return jnp.where(kept, logits, -jnp.inf)

    return jax.lax.cond(active, threshold, lambda: logits)
