"""Which layers see all positions and which a window, in published configs."""

from dataclasses import dataclass

from transformer.storage.formats.rotary import GLOBAL, LOCAL


@dataclass(frozen=True)
class Windows:
    """`sliding_window`, and which layers have it.

    Attributes:
      all_layers: every layer has it (Mistral).
      period: where `layer_types` is missing, every layer of that many sees all positions, and the
        others a window (Gemma 2: 2); None: none has a window, unless `use_sliding_window` says so
        for those from `max_window_layers` on (Qwen 2).
      default: the window where none is given.
    """

    all_layers: bool = False
    period: int | None = None
    default: int | None = None

    def read(self, fields, found):
        """As in `Option`."""
        window = fields.take("sliding_window", int | None, self.default)
        period = fields.take("sliding_window_pattern", int | None, None)
        period = fields.take("_sliding_window_pattern", int | None, period) or self.period
        from_layer = fields.take("max_window_layers", int, 28)
        used = fields.take("use_sliding_window", bool, self.all_layers or bool(self.period))
        kinds = fields.take("layer_types", tuple[str, ...] | None, None)
        layers = range(found["num_layers"])
        if kinds is None and self.all_layers:
            kinds = [LOCAL for _ in layers]
        elif kinds is None and period:
            kinds = [LOCAL if (n + 1) % period else GLOBAL for n in layers]
        elif kinds is None:
            kinds = [LOCAL if used and n >= from_layer else GLOBAL for n in layers]
        if len(kinds) != len(layers) or set(kinds) - {LOCAL, GLOBAL}:
            raise fields.refused(
                f"layer_types={list(kinds)!r}",
                f"it must name one of {LOCAL} and {GLOBAL} for each of {len(layers)} layers",
            )
        found["window"] = shortest([window if kind == LOCAL and used else None for kind in kinds])

    def write(self, config, values):
        """As in `Option`."""
        windows = [window for _, window in config.layers]
        values["sliding_window"] = next((w for w in windows if w is not None), None)
        if not self.all_layers:
            values["layer_types"] = [GLOBAL if w is None else LOCAL for w in windows]
        if not self.all_layers and self.period is None:
            values["use_sliding_window"] = values["sliding_window"] is not None
            first = next((n for n, w in enumerate(windows) if w is not None), len(windows))
            values["max_window_layers"] = first


def shortest(layers):
    """The shortest pattern that repeats over the layers; one value where they are all alike."""
    for period in range(1, len(layers) + 1):
        if all(layers[n] == layers[n % period] for n in range(len(layers))):
            break
    return layers[0] if period == 1 else tuple(layers[:period])
