"""A published architecture: how its config and its tensors are written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformer.config import Config
from transformer.storage.formats.fields import Fields
from transformer.storage.formats.options import Option
from transformer.storage.formats.tables import Table

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
      model_type, architecture: its names in `config.json`.
      options: the keys of its config, in the order in which they are read.
      table: from the parameters of a config to its tensors.
      prefix: what begins the names of its tensors, but for that of the output; files without it
        are read too.
      ignored: patterns of tensors that hold no parameters, such as masks, and which are not read;
        {L} is the number of layers.
      variant: from a published config to the family that reads it, where its tensors lie otherwise;
        None: this one.
    """

    model_type: str
    architecture: str
    options: tuple[Option, ...]
    table: Callable[[Config], Table]
    prefix: str = "model."
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    variant: Callable[[Mapping[str, Any]], "Family | None"] = lambda _: None

    def read(self, values: Mapping[str, Any], where: str) -> Config:
        """Reads a published config.

        Args:
          values: its keys.
          where: the file that they are from.

        Raises:
          ValueError: a key is missing, unknown, or of a value that is not supported; names `where`.
        """
        fields, found = Fields(values, "the config"), {}
        fields.drop("model_type")
        try:
            for option in self.options:
                option.read(fields, found)
                if found.get("num_layers", 0) > _MOST_LAYERS:  # options go through them
                    raise ValueError(f"{found['num_layers']} layers are more than {_MOST_LAYERS}.")
            fields.finish()
            return Config(**found)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{where}: {error}") from error

    def write(self, config: Config) -> dict[str, Any]:
        """Writes a config in the published form; what it cannot say is lost."""
        values = {"architectures": [self.architecture], "model_type": self.model_type}
        for option in self.options:
            option.write(config, values)
        return values
