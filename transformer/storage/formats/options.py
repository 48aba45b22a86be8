"""The parts of a published config: what each key means for `Config`, read and written.

An option reads its keys from `Fields` into the keyword arguments of a `Config`, and writes them
back from a config. It need not know which configs it can hold: what was written is read again, and
has to give the same config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from transformer.config import Config
from transformer.storage.formats.fields import _REQUIRED, Fields


class Option(Protocol):
    """Some keys of a published config."""

    def read(self, fields: Fields, found: dict) -> None:
        """Reads the keys; `found` has the config's arguments so far, and gets more."""

    def write(self, config: Config, values: dict) -> None:
        """Puts the keys for a config into `values`."""


@dataclass(frozen=True)
class Same:
    """A key that is a field of `Config`.

    Attributes:
      published, ours: its two names.
      kind: its type.
      default: where the key is missing; none: it must be there.
    """

    published: str
    ours: str
    kind: Any = int
    default: Any = _REQUIRED

    def read(self, fields, found):
        """As in `Option`."""
        found[self.ours] = fields.take(self.published, self.kind, self.default)

    def write(self, config, values):
        """As in `Option`."""
        values[self.published] = _resolved(config, self.ours)


@dataclass(frozen=True)
class Chosen:
    """A key whose values have other names here.

    Attributes:
      published, ours: its two names.
      choices: from the published values to ours, the one that is written first.
      default: the published value where the key is missing; none: it must be there.
    """

    published: str
    ours: str
    choices: Mapping
    default: Any = _REQUIRED

    def read(self, fields, found):
        """As in `Option`."""
        found[self.ours] = fields.choose(self.published, self.choices, self.default)

    def write(self, config, values):
        """As in `Option`."""
        wanted = getattr(config, self.ours)
        values[self.published] = next((k for k, v in self.choices.items() if v == wanted), None)


@dataclass(frozen=True)
class Only:
    """A key that has no counterpart here, and the values that it may have; the first is written."""

    published: str
    allowed: tuple = (False,)

    def read(self, fields, found):
        """As in `Option`."""
        fields.only(self.published, *self.allowed)

    def write(self, config, values):
        """As in `Option`."""
        values[self.published] = self.allowed[0]


@dataclass(frozen=True)
class Unused:
    """Keys that mean nothing in this architecture, and why."""

    names: tuple[str, ...]
    reason: str

    def read(self, fields, found):
        """As in `Option`."""
        fields.drop(*self.names)

    def write(self, config, values):
        """As in `Option`."""


@dataclass(frozen=True)
class Always:
    """Fields of `Config` that this architecture always has."""

    fields: Mapping[str, Any]

    def read(self, fields, found):
        """As in `Option`."""
        found |= self.fields

    def write(self, config, values):
        """As in `Option`."""


@dataclass(frozen=True)
class Scale:
    """The factor on the scores of attention, given by the number whose root it divides by."""

    published: str = "query_pre_attn_scalar"
    default: int = 256

    def read(self, fields, found):
        """As in `Option`."""
        found["attention_scale"] = fields.take(self.published, float, float(self.default)) ** -0.5

    def write(self, config, values):
        """As in `Option`."""
        scale = config.attention_scale or config.shape.H**-0.5
        number = scale**-2
        values[self.published] = round(number) if abs(number - round(number)) < 1e-9 else number


@dataclass(frozen=True)
class RootOfWidth:
    """Embeddings are multiplied by the root of the width."""

    def read(self, fields, found):
        """As in `Option`."""
        found["embedding_scale"] = found["width"] ** 0.5

    def write(self, config, values):
        """As in `Option`."""


def _resolved(config, name):
    """A field, or the size that it has where it is None."""
    sizes = {"num_kv_heads": "K", "head_size": "H", "feed_forward_width": "F"}
    return getattr(config.shape, sizes[name]) if name in sizes else getattr(config, name)
