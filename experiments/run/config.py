"""The config of an experiment: sections of typed fields, every one of them known and checked.

The function `get_config` of a config file returns what `default_config` makes, with some fields
set. Flags as `--config.train.steps=N` change single fields.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ml_collections import config_dict

from kernels.backends.choice import check_backend
from transformer.config import Config, fits, wrong_type
from transformer.numerics.numerics import Numerics
from transformer.training.lora import LoraConfig
from transformer.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Data:
    """The corpus, and the batches made of it.

    path: a glob of the files, in which `**` matches folders at any depth; None: the source of
      Python's standard library.
    separator: the text between the documents of a file; None: each file is a document.
    chat: whether the files are JSON lines of conversations, each an object whose "messages" have a
      "role" and a "content". The template of the model's tokenizer makes a text of them, of which
      what the assistant says counts in the loss. Neither separator nor document_length apply.
    document_length: documents of more characters are cut, at the ends of lines; None: only where
      all the corpus is one document, which is cut into about 100 pieces.
    tokenizer: "bytes", or "bpe" trained on the training documents.
    vocab_size: V of "bpe".
    batch_size, length: B and T of one step, over all devices.
    validation_fraction: the share of the documents that is held out.
    seed: the seed of the order of documents.
    """

    path: str | None = None
    separator: str | None = None
    chat: bool = False
    document_length: int | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 2048
    batch_size: int = 8
    length: int = 256
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        _require_positive(self, "batch_size", "length")
        if self.tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"tokenizer={self.tokenizer!r} does not exist; choose bytes or bpe.")
        if self.chat and (self.separator is not None or self.document_length is not None):
            raise ValueError(
                "chat=True: a line is a conversation; separator and document_length must be None."
            )


@dataclass(frozen=True)
class Train:
    """The steps of a run, and what is done between them.

    steps: how many there are in all.
    seed: the seed of the initial parameters.
    numerics: "fast" or "exact", also for validation and samples. Exact steps compute the same bits
      as `score` and `generate`.
    attention: the backend of `kernels.attention`, also for validation and samples.
    accumulate, loss_parts, z_loss, ema_decay: as in `transformer.training.step.make_train_step`.
    log_every, eval_every, sample_every: steps between rows of metrics, validations and samples;
      the last step has all three.
    sample_length: how many tokens a sample has at most.
    """

    steps: int = 1000
    seed: int = 0
    numerics: str = "fast"
    attention: str = "auto"
    accumulate: int = 1
    loss_parts: int = 1
    z_loss: float = 0.0
    ema_decay: float | None = None
    log_every: int = 10
    eval_every: int = 200
    sample_every: int = 500
    sample_length: int = 128

    def __post_init__(self):
        _require_positive(self, "steps", "log_every", "eval_every", "sample_every")
        _require_positive(self, "sample_length", "accumulate", "loss_parts")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}; it must be between 0 and 2**32 - 1.")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss={self.z_loss}; it must be 0 or more.")
        check_backend(self.attention)
        Numerics(self.numerics)


@dataclass(frozen=True)
class Init:
    """What the first step starts from.

    path: a model as `transformer.load` takes it, published or our own, with whose parameters,
      architecture and tokenizer the run goes on; config.model then gives `dtype` and `remat` only,
      and the tokenizer's settings in config.data are not used. None: random parameters.
    """

    path: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """When to save, and which checkpoints to keep.

    every: steps between saves; the last step is saved too.
    keep_last, keep_best: how many of the newest, and of the best at validation, are kept.
    """

    every: int = 200
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        _require_positive(self, "every", "keep_last")
        if self.keep_best < 0:
            raise ValueError(f"keep_best={self.keep_best}; it must be 0 or more.")


@dataclass(frozen=True)
class Devices:
    """What a run is laid out on.

    mesh: the size of each axis of the mesh of devices, as "data=2,fsdp=2,tensor=2"; see
      `transformer.devices.mesh.make_mesh`. By default the rows of a batch are split over all
      devices.
    """

    mesh: str = "data=-1"


@dataclass(frozen=True)
class Experiment:
    """A whole config.

    model: the fields of `Config` but for `vocab_size`, which the tokenizer gives.
    """

    model: dict
    data: Data = field(default_factory=Data)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    init: Init = field(default_factory=Init)
    lora: LoraConfig = field(default_factory=LoraConfig)
    devices: Devices = field(default_factory=Devices)

    def __post_init__(self):
        if self.data.batch_size % self.train.accumulate:
            raise ValueError(
                f"config.data.batch_size={self.data.batch_size} must be a multiple of "
                f"config.train.accumulate={self.train.accumulate}, so that the parts are equal."
            )
        if self.data.length % self.train.loss_parts:
            raise ValueError(
                f"config.data.length={self.data.length} must be a multiple of "
                f"config.train.loss_parts={self.train.loss_parts}, so that the parts are equal."
            )
        if self.init.path is None and (self.lora.rank is not None or self.data.chat):
            what = (
                "config.data.chat=True" if self.data.chat else f"config.lora.rank={self.lora.rank}"
            )
            raise ValueError(f"{what} is for a model that is there; give config.init.path.")
        model = self.architecture(vocab_size=1)
        if self.optimizer.transfer is not None and (model.tie_embeddings or self.lora.rank):
            raise ValueError(
                f"config.optimizer.transfer={self.optimizer.transfer} goes with "
                "config.model.tie_embeddings=False, as the output's matrix takes smaller steps "
                "than the embedding's, and without config.lora.rank."
            )
        if self.init.path is None:
            self.require_room(model, "config.model.max_length")

    def require_room(self, model: Config, what: str) -> None:
        """Refuses rows that are longer than a model can read; `what` names its max_length."""
        if self.data.length > model.max_length:
            raise ValueError(
                f"config.data.length={self.data.length} must be at most {what}={model.max_length}."
            )

    def architecture(self, vocab_size: int) -> Config:
        """The model for a tokenizer of that many tokens."""
        with named_in_full("model", Config):
            return Config(vocab_size=vocab_size, **self.model)

    def to_dict(self) -> dict:
        """The config as plain values, for JSON."""
        return dataclasses.asdict(self)


def default_config(model: Config, kind: type = Experiment) -> config_dict.ConfigDict:
    """Makes a config of all sections: `model`'s architecture, and the defaults of the others.

    Args:
      kind: `Experiment`, or a dataclass made of it that has further sections.
    """
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(Config)}
    del fields["vocab_size"]
    config = config_dict.ConfigDict()
    config.model = _section(Config, fields)
    for f in dataclasses.fields(kind)[1:]:
        config[f.name] = _section(f.type, dataclasses.asdict(f.type()))
    return config


def _section(kind, values):
    hints = typing.get_type_hints(kind)
    section = config_dict.ConfigDict()
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        # ml_collections checks plain types itself; a field of several types takes any literal,
        # and `read_config` checks it.
        if isinstance(hints[name], types.UnionType):
            value = config_dict.FieldReference(value, field_type=object)
        section[name] = value
    return section


def read_config(config: config_dict.ConfigDict, kind: type = Experiment) -> Experiment:
    """Reads the experiment that a config describes; what it leaves out has its default.

    Args:
      config: as `default_config` makes it.
      kind: as in `default_config`.

    Raises:
      ValueError: a section or field does not exist, a value has another type, or values do not fit
        together.
    """
    if not isinstance(config, config_dict.ConfigDict):
        raise ValueError(
            f"get_config returns {config!r}; it must return a ConfigDict, as "
            "experiments.run.config.default_config makes it."
        )
    values = config.to_dict()
    sections = {f.name: f.type for f in dataclasses.fields(kind)}
    for name in values:
        _require_known("config", name, sections)
    model = values.pop("model", {})
    _check("config.model", model, Config, omit=("vocab_size",))
    for name, section in values.items():
        _check(f"config.{name}", section, sections[name])
    made = {}
    for name, section in values.items():
        with named_in_full(name, sections[name]):
            made[name] = sections[name](**section)
    return kind(model, **made)


@contextmanager
def named_in_full(section: str, kind: type) -> Iterator[None]:
    """Names fields as flags do in the errors of the body: steps=3 becomes config.train.steps=3.

    Args:
      section: the section of the config that the fields stand in.
      kind: the dataclass whose fields they are.

    Raises:
      ValueError: the body raised a ValueError or a TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        names = "|".join(f.name for f in dataclasses.fields(kind))
        full = rf"config.{section}.\1"
        text = re.sub(rf"(?:\b{section} )?(?<![\w.])({names})(?==|\.\w+=)", full, str(error))
        raise ValueError(text) from error


def _check(where, given, kind, omit=()):
    """Checks that `given` has fields of a dataclass, each of its type, and those it must have."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}={given!r}; it must be a section of fields.")
    for f in dataclasses.fields(kind):
        optional = f.default is not dataclasses.MISSING or f.name in omit
        if not optional and f.name not in given:
            raise ValueError(f"{where} lacks {f.name}.")
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in omit}
    for name, value in given.items():
        _require_known(where, name, hints)
        hint = hints[name]
        nested = next((k for k in typing.get_args(hint) if dataclasses.is_dataclass(k)), None)
        if nested and isinstance(value, dict):
            _check(f"{where}.{name}", value, nested)
        elif not fits(value, hint):
            raise ValueError(f"{where}.{name}={value!r} {wrong_type(value, hint)}")


def _require_known(where, name, known):
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}."
        raise ValueError(f"{where} has no field {name!r}; {hint}")


def _require_positive(values, *names):
    for name in names:
        if getattr(values, name) < 1:
            raise ValueError(f"{name}={getattr(values, name)}; it must be at least 1.")
