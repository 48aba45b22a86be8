"""What the layers of a config are, one by one: their kinds, their memories, their blocks."""

from dataclasses import dataclass

from transformer.config import Config
from transformer.numerics.numerics import FAST, Numerics


@dataclass(frozen=True)
class LayerSpec:
    """One layer of an architecture.

    Attributes:
      config: the architecture, in which `window` and `layer_kinds` are those of this layer, and
        `num_experts` is 0 where it has none.
      kind: one of `config.LAYER_KINDS`.
      backend: what runs its attention.
      numerics: what it computes with.
      reads: the number of the block that the layer reads again, instead of writing one of its own;
        None: it writes its own.
    """

    config: Config
    kind: str
    backend: str = "auto"
    numerics: Numerics = FAST
    reads: int | None = None


def layer_specs(
    config: Config, kinds: dict, backend: str = "auto", numerics: Numerics = FAST
) -> tuple[LayerSpec, ...]:
    """The layers in order; where they are scanned, those of one repeat.

    Args:
      config: the architecture.
      kinds: the module of each kind, of which `blocks(spec)` are a layer's blocks.
      backend: what runs attention.
      numerics: what the layers compute with.
    """
    specs, last_written, written = [], {}, 0
    layers = config.pattern if config.scan_layers else config.layers
    for n, layer in enumerate(layers):
        kind, window = layer
        shares = kind == "attention" and n >= config.num_layers - config.num_shared_kv_layers
        spec = LayerSpec(
            _of_layer(config, n, kind, window),
            kind,
            backend,
            numerics,
            reads=last_written[layer] if shares and not config.scan_layers else None,
        )
        specs.append(spec)
        if spec.reads is None:
            last_written[layer] = written
            written += len(kinds[kind].blocks(spec))
    return tuple(specs)


def _of_layer(config, n, kind, window):
    """The config as one layer sees it."""
    if n in config.dense_layers:
        config = config.replace(num_experts=0, num_dense_layers=0)
    # What is allowed depends on the kinds of all layers: a kind that takes no window, beside one
    # that has one.
    cache_dtype = config.cache_dtype if kind == "attention" else None
    return config.replace(window=window, layer_kinds=kind, cache_dtype=cache_dtype)
