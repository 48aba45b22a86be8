"""Which layers see all positions and which a window, in published configs."""

from dataclasses import dataclass

from transformer.storage.formats.rotary import GLOBAL, LOCAL


@dataclass(frozen=True)
class AllLayers:
    """`sliding_window`, which all layers have, or none (Mistral).

    Attributes:
      flagged: whether they have it only where `use_sliding_window` is true (Qwen3-MoE).
      default: the window where none is given.
    """

    flagged: bool = False
    default: int | None = None

    def read(self, fields, found):
        """As in `Option`."""
        window = fields.take("sliding_window", int | None, self.default)
        if self.flagged and not fields.take("use_sliding_window", bool, False):
            window = None
        found["window"] = window

    def write(self, config, values):
        """As in `Option`."""
        _, values["sliding_window"] = config.layers[0]
        if self.flagged:
            values["use_sliding_window"] = values["sliding_window"] is not None


@dataclass(frozen=True)
class SomeLayers:
    """`sliding_window`, and which layers have it, by `layer_types`.

    Attributes:
      period: where `layer_types` is missing, every layer of that many sees all positions, and the
        others a window (Gemma 2: 2); None: those from `max_window_layers` on have it, if
        `use_sliding_window` is true (Qwen 2).
      default: the window where none is given.
      every_other: with period None: every other layer below `max_window_layers` has it (Qwen2-MoE).
    """

    period: int | None = None
    default: int = 4096
    every_other: bool = False

    def read(self, fields, found):
        """As in `Option`."""
        window, layers = (
            fields.take("sliding_window", int | None, self.default),
            found["num_layers"],
        )
        default = self._by_period(fields, layers) if self.period else self._by_flag(fields, layers)
        given = fields.take("layer_types", tuple[str, ...] | None, None)
        kinds = list(given) if given is not None and default is not None else default
        if kinds is None:
            found["window"] = None
            return
        if len(kinds) != layers or set(kinds) - {LOCAL, GLOBAL}:
            raise fields.refused(
                f"layer_types={kinds!r}",
                f"it must name one of {LOCAL} and {GLOBAL} for each of {layers} layers",
            )
        found["window"] = shortest([window if kind == LOCAL else None for kind in kinds])

    def _by_period(self, fields, layers):
        period = fields.take("sliding_window_pattern", int | None, None)
        period = fields.take("_sliding_window_pattern", int | None, period) or self.period
        return [LOCAL if (n + 1) % period else GLOBAL for n in range(layers)]

    def _by_flag(self, fields, layers):
        """None where no layer has a window, whatever `layer_types` says."""
        first = fields.take("max_window_layers", int, 28)
        used = fields.take("use_sliding_window", bool, False)
        if not used:
            return None
        local = (lambda n: n % 2 == 0 and n < first) if self.every_other else lambda n: n >= first
        return [LOCAL if local(n) else GLOBAL for n in range(layers)]

    def write(self, config, values):
        """As in `Option`."""
        windows = [window for _, window in config.layers]
        values["sliding_window"] = next((w for w in windows if w is not None), None)
        values["layer_types"] = [GLOBAL if w is None else LOCAL for w in windows]
        if self.period is None:
            values["use_sliding_window"] = values["sliding_window"] is not None
            first = next((n for n, w in enumerate(windows) if w is not None), len(windows))
            values["max_window_layers"] = first


def shortest(layers):
    """The shortest pattern that repeats over the layers; one value where they are all alike."""
    for period in range(1, len(layers) + 1):
        if all(layers[n] == layers[n % period] for n in range(len(layers))):
            break
    return layers[0] if period == 1 else tuple(layers[:period])
