"""What is done to logits before temperature and filters: functions of one token's logits [V].

Like the filters of `inference.sampling` they are to be composed and vmapped, and their parameters
are data, not constants of the compiled program. What is not asked for is None, and costs nothing.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer.checks import token_ids


@struct.dataclass
class Written:
    """What a sequence consists of so far.

    tokens: int32 [S], prompt and completion, -1 behind the last.
    in_prompt: bool [V], which ids the prompt has. counts: int32 [V], how often the completion has
    each id.
    """

    tokens: jax.Array
    in_prompt: jax.Array
    counts: jax.Array

    @classmethod
    def begin(cls, prompt: np.ndarray, capacity: int, vocab_size: int) -> "Written":
        """A sequence that consists of its prompt, int32 [T]."""
        in_prompt = np.zeros(vocab_size, bool)
        in_prompt[prompt] = True
        tokens = np.pad(prompt, (0, capacity - len(prompt)), constant_values=-1)
        return cls(tokens, in_prompt, np.zeros(vocab_size, np.int32))

    def push(self, token: jax.Array, i: jax.Array) -> "Written":
        """The sequence with the token at position i; nothing is scattered."""
        here = jnp.arange(len(self.tokens)) == i
        drawn = jnp.arange(len(self.counts)) == token
        return self.replace(tokens=jnp.where(here, token, self.tokens), counts=self.counts + drawn)


@struct.dataclass
class Penalties:
    """Against repetition: scalar arrays float32. 1, 0 and 0 are off."""

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


@struct.dataclass
class Adjustments:
    """All that is done to logits, in this order; None where nothing is.

    penalties: for ids that were written before. bias: float32 [V], added. process: a traceable
    function of the caller's, (logits [V], tokens [S]) -> logits [V], with `Written.tokens`.
    """

    penalties: Penalties | None = None
    bias: jax.Array | None = None
    process: Callable | None = struct.field(pytree_node=False, default=None)

    @property
    def need_written(self) -> bool:
        """Whether they depend on what was written before."""
        return self.penalties is not None or self.process is not None

    def __call__(self, logits: jax.Array, written: Written | None) -> jax.Array:
        """The logits [V] that temperature and filters see."""
        if self.penalties is not None:
            seen = written.in_prompt | (written.counts > 0)
            logits = penalize_repetition(logits, seen, self.penalties.repetition)
            logits = penalize_presence(logits, written.counts, self.penalties.presence)
            logits = penalize_frequency(logits, written.counts, self.penalties.frequency)
        if self.bias is not None:
            logits = logits + self.bias
        if self.process is not None:
            logits = self.process(logits, written.tokens)
        return logits


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of ids that were seen [V], divided by the penalty, or times it where negative.

    The penalty is above 0, and 1 changes nothing (arXiv:1909.05858).
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_presence(logits: jax.Array, counts: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits less a penalty for ids that were written at all, as in OpenAI's interface."""
    return logits - penalty * (counts > 0)


def penalize_frequency(logits: jax.Array, counts: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits less a penalty for each time that an id was written, as in OpenAI's interface."""
    return logits - penalty * counts


def penalties(
    repetition_penalty: float, presence_penalty: float, frequency_penalty: float
) -> Penalties | None:
    """Checks the penalties, which are as in `Options`; None where all are off.

    Raises:
      ValueError: one is outside of its range.
      TypeError: one is not a number.
    """
    given = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    for name, value in given.items():
        if not hasattr(value, "__float__"):
            raise TypeError(f"{name}={value!r}; it must be a number.")
        if not np.isfinite(value):
            raise ValueError(f"{name}={value}; it must be finite.")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty={repetition_penalty}; it must be above 0.")
    values = tuple(np.float32(value) for value in given.values())
    return None if values == (1, 0, 0) else Penalties(*values)


def bias(given: Mapping[int, float] | None, vocab_size: int) -> np.ndarray | None:
    """Checks a `logit_bias`, and returns it as an array, float32 [V]; None where there is none.

    Raises:
      ValueError: an id outside of the vocabulary, a bias that is neither finite nor -inf, or every
        id is forbidden.
      TypeError: it does not map ids to numbers.
    """
    if not given:
        return None
    if not isinstance(given, Mapping) or not all(hasattr(x, "__float__") for x in given.values()):
        raise TypeError(f"logit_bias={given!r}; it must map token ids to numbers.")
    made = np.zeros(vocab_size, np.float32)
    made[np.asarray(token_ids(list(given), vocab_size, "logit_bias"))] = list(given.values())
    if np.isnan(made).any() or (made == np.inf).any():
        raise ValueError("logit_bias holds a number that is neither finite nor -inf.")
    if (made == -np.inf).all():
        raise ValueError("logit_bias forbids every token; leave at least one.")
    return made
