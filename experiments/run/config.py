"""What an experiment can be told: sections of typed fields, every one of them known and checked.

A config file's `get_config` returns what `default_config` makes, with some fields set. Flags as
`--config.train.steps=N` change single fields.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

from ml_collections import config_dict

from kernels.backends.choice import check_backend
from transformer.config import Config, fits, wrong_type
from transformer.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Data:
    """The corpus, and the batches made of it.

    path: glob of the files, `**` for any depth; None: the source of Python's standard library.
    tokenizer: "bytes", or "bpe" trained on the training documents.
    vocab_size: V of "bpe".
    batch_size, length: B and T of one step, over all devices of the process.
    validation_fraction: share of the documents that is held out.
    seed: of the order of documents.
    """

    path: str | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 2048
    batch_size: int = 8
    length: int = 256
    validation_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self):
        _require_positive("data", self, "batch_size", "length")
        if self.tokenizer not in ("bytes", "bpe"):
            raise ValueError(
                f"config.data.tokenizer={self.tokenizer!r} does not exist; choose bytes or bpe."
            )


@dataclass(frozen=True)
class Train:
    """The run.

    steps: how many in all.
    seed: of the initial parameters.
    attention: the backend of `kernels.attention`, also for validation and samples.
    accumulate, z_loss, ema_decay: as in `transformer.training.step.make_train_step`.
    data_parallel: split every batch and the optimizer's state over all devices of the process.
    log_every, eval_every, sample_every: steps between rows of metrics, validations and samples;
      the last step has all three.
    sample_length: tokens of a sample.
    """

    steps: int = 1000
    seed: int = 0
    attention: str = "auto"
    accumulate: int = 1
    z_loss: float = 0.0
    ema_decay: float | None = None
    data_parallel: bool = False
    log_every: int = 10
    eval_every: int = 200
    sample_every: int = 500
    sample_length: int = 128

    def __post_init__(self):
        _require_positive("train", self, "steps", "log_every", "eval_every", "sample_every")
        _require_positive("train", self, "sample_length", "accumulate")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"config.train.seed={self.seed}; it is between 0 and 2**32 - 1.")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"config.train.z_loss={self.z_loss}; it is a number from 0 on.")
        check_backend(self.attention)


@dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to keep.

    every: steps between saves; the last step is saved too.
    keep_last, keep_best: how many of the newest, and of the best at validation, are kept.
    """

    every: int = 200
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        _require_positive("checkpoint", self, "every", "keep_last")
        if self.keep_best < 0:
            raise ValueError(f"config.checkpoint.keep_best={self.keep_best}; it is 0 or more.")


@dataclass(frozen=True)
class Experiment:
    """A whole config.

    model: fields of `Config`, but for `vocab_size`, which the tokenizer gives.
    """

    model: dict
    data: Data = field(default_factory=Data)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def __post_init__(self):
        if self.data.batch_size % self.train.accumulate:
            raise ValueError(
                f"config.data.batch_size={self.data.batch_size} is no multiple of "
                f"config.train.accumulate={self.train.accumulate}."
            )
        max_length = self.architecture(vocab_size=1).max_length
        if self.data.length > max_length:
            raise ValueError(
                f"config.data.length={self.data.length} is more than "
                f"config.model.max_length={max_length}."
            )

    def architecture(self, vocab_size: int) -> Config:
        """The model for a tokenizer of that many tokens."""
        return Config(vocab_size=vocab_size, **self.model)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def default_config(model: Config) -> config_dict.ConfigDict:
    """A config of all sections, with `model`'s architecture and the defaults of the others.

    Fields that the model derived (head_size, ...) are None, to follow those they derive from.
    """
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(Config)}
    del fields["vocab_size"]
    for name in ("num_kv_heads", "head_size", "feed_forward_width"):
        with contextlib.suppress(ValueError):
            if model.replace(**{name: None}) == model:
                fields[name] = None
    config = config_dict.ConfigDict()
    config.model = _section(Config, fields)
    for f in dataclasses.fields(Experiment)[1:]:
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


def read_config(config: config_dict.ConfigDict) -> Experiment:
    """The experiment that a config describes; what it leaves out has its default.

    Raises:
      ValueError: a section or field that does not exist, a value of another type, or values that
        do not fit together.
    """
    if not isinstance(config, config_dict.ConfigDict):
        raise ValueError(
            f"get_config returns {config!r}; it returns a ConfigDict, which "
            "experiments.run.config.default_config makes."
        )
    values = config.to_dict()
    sections = {f.name: f.type for f in dataclasses.fields(Experiment)}
    for name in values:
        _require_known("config", name, sections)
    model = values.pop("model", {})
    _check("config.model", model, Config, omit=("vocab_size",))
    for name, section in values.items():
        _check(f"config.{name}", section, sections[name])
    return Experiment(model, **{name: sections[name](**values[name]) for name in values})


def _check(where, given, kind, omit=()):
    """`given` is fields of the dataclass `kind`, each of its type, and all that have no default."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}={given!r} is no section of fields.")
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


def _require_positive(section, values, *names):
    for name in names:
        if getattr(values, name) < 1:
            raise ValueError(
                f"config.{section}.{name}={getattr(values, name)}; it must be at least 1."
            )
