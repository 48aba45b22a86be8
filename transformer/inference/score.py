"""A model as a judge of text: the log-probabilities it gives to tokens."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from transformer.axes import constrain
from transformer.checks import token_ids
from transformer.modes.schedule import parallel
from transformer.program.init import init_cache
from transformer.program.program import program

# The shortest padded length.
_SHORTEST = 64


def score(model, tokens, *, numerics: str = "fast") -> np.ndarray:
    """Log-probabilities that a model gives to the tokens of one sequence, in the parallel mode.

    Tokens are padded to a power of two, so that few lengths are ever compiled.

    Args:
      model: the model.
      tokens: [T] int; the first one is given, not judged: for a whole document it is the
        tokenizer's `end_of_document`.
      numerics: as in `program`.

    Returns:
      float32 [T-1]: log p(tokens[t] | tokens[:t]) in nats for t = 1..T-1.

    Raises:
      ValueError: no tokens, more than `max_length` of them, or ids outside of the vocabulary.
      TypeError: the tokens are not integers.
    """
    return judge(model, tokens, numerics=numerics)[0]


def judge(model, tokens, *, numerics: str = "fast") -> tuple[np.ndarray, np.ndarray]:
    """What `score` returns, and which tokens are the likeliest ones where they stand: bool [T-1].

    Arguments and errors are those of `score`.
    """
    tokens = np.asarray(token_ids(tokens, model.config.vocab_size))
    length, max_length = len(tokens), model.config.max_length
    if length > max_length:
        raise ValueError(
            f"{length} tokens are more than the {max_length} positions of the model "
            "(max_length); score them in parts."
        )
    padded = min(max(_SHORTEST, 1 << (length - 1).bit_length()), max_length)
    filled = np.zeros(padded, np.int32)
    filled[:length] = tokens
    compute = _scorer(model.config, numerics)
    logprobs, likeliest = compute(model.params, filled, length)
    return np.asarray(logprobs)[: length - 1], np.asarray(likeliest)[: length - 1]


@lru_cache(maxsize=16)
def _scorer(config, numerics):
    f = program(config, numerics=numerics)

    @jax.jit
    def compute(params, tokens, length):
        positions = jnp.arange(len(tokens), dtype=jnp.int32)
        positions = jnp.where(positions < length, positions, -1)
        logits = parallel(f, params, init_cache(config, len(tokens)), tokens, positions)[1]
        logprobs = -f.numerics.cross_entropy(logits[:-1], tokens[1:])[0]
        # Whole, for every process reads them.
        return constrain(logprobs), constrain(logits[:-1].argmax(-1) == tokens[1:])

    return compute
