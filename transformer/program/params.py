"""The parameters of a transformer."""

import jax
from flax import struct

from transformer.config import Config
from transformer.program.layers import Layer
from transformer.program.linear import Linear, Norm


@struct.dataclass
class Params:
    """All parameters of a transformer, float32.

    Attributes:
      embedding: [V, E].
      layers: one `Layer` per layer; where layers are scanned, one per layer of the pattern that
        repeats, whose arrays have a leading axis of repeats.
      positions: [max_length, E] where they are learned; else None.
      final_norm: before the logits; None where `norm_placement` is "post".
      output: [E, V]; None where it is tied to the embedding.
      embedding_in, embedding_out: [D, E] and [E, D], where the embedding is [V, D] and the output
        [D, V], with another width D; else None.
    """

    embedding: jax.Array
    layers: tuple[Layer, ...]
    positions: jax.Array | None = None
    final_norm: Norm | None = None
    output: Linear | None = None
    embedding_in: Linear | None = None
    embedding_out: Linear | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.shape[0]


def unscanned(config: Config, params: Params) -> tuple[Config, Params]:
    """The same model with each layer by itself."""
    if not config.scan_layers:
        return config, params
    repeats = config.num_layers // len(config.pattern)
    layers = tuple(
        jax.tree.map(lambda x, n=n: x[n], layer) for n in range(repeats) for layer in params.layers
    )
    return config.replace(scan_layers=False), params.replace(layers=layers)
