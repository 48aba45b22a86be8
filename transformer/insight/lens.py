"""What the residual stream says already: the logit lens and the tuned lens."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer.insight.residual import config_of, stream
from transformer.insight.trace import Trace, trace
from transformer.program.init import init_cache
from transformer.program.params import Params
from transformer.program.program import unembed


@struct.dataclass
class TunedLens:
    """For each layer what the later ones do on average (arXiv:2303.08112): x + x A + b.

    matrices: [L, E, E]; biases: [L, E]. Zeros are the logit lens.
    """

    matrices: jax.Array
    biases: jax.Array

    @classmethod
    def zeros(cls, num_layers: int, width: int) -> "TunedLens":
        """The lens that changes nothing."""
        return cls(jnp.zeros((num_layers, width, width)), jnp.zeros((num_layers, width)))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the lens to a file, .npz."""
        np.savez(path, matrices=self.matrices, biases=self.biases)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TunedLens":
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(jnp.asarray(arrays["matrices"]), jnp.asarray(arrays["biases"]))


def lens(f, params: Params, seen: Trace, tuned: TunedLens | None = None):
    """What the model would predict after each layer: logits [L, T, V].

    Args:
      f: a program made by `program`, or one under edits.
      params: its parameters.
      seen: a trace of it.
      tuned: a lens that `tune` trained; None: the logit lens, which is the model's own last norm
        and output on the stream as it is.
    """
    return _read(f, params, stream(f, params, seen).after, tuned)


def tune(
    f, params: Params, sequences: Sequence, *, steps: int = 200, learning_rate: float = 1e-3
) -> TunedLens:
    """Trains a tuned lens: each layer's prediction towards the model's own, by their divergence.

    Args:
      f: a program made by `program`.
      params: its parameters, which stay as they are.
      sequences: [B, T] int; step n runs sequence n % B.
      steps: how many steps are taken.
      learning_rate: of Adam.
    """
    import optax  # here, because it takes a while

    config = config_of(f)
    sequences = jnp.asarray(np.asarray(sequences), jnp.int32)
    cache = init_cache(config, sequences.shape[1])
    optimizer = optax.adam(learning_rate)

    def divergence(tuned, tokens):
        seen = trace(f, params, cache, tokens)
        after = jax.lax.stop_gradient(stream(f, params, seen).after)
        guess = jax.nn.log_softmax(_read(f, params, after, tuned))
        truth = jax.nn.log_softmax(seen.logits)
        return (jnp.exp(truth) * (truth - guess)).sum(-1).mean()

    @jax.jit
    def step(n, carry):
        tuned, state = carry
        slope = jax.grad(divergence)(tuned, sequences[n % len(sequences)])
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(tuned, updates), state

    tuned = TunedLens.zeros(config.num_layers, config.width)
    return jax.lax.fori_loop(0, steps, step, (tuned, optimizer.init(tuned)))[0]


def _read(f, params, after, tuned):
    """Streams [L, T, E] -> logits [L, T, V]."""
    if tuned is not None:
        moved = jnp.einsum("lte,lef->ltf", after, tuned.matrices.astype(after.dtype))
        after = after + moved + tuned.biases[:, None].astype(after.dtype)
    return jax.vmap(jax.vmap(lambda x: unembed(f, params, x)))(after)
