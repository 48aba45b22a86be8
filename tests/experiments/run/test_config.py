"""The config of an experiment."""

import pytest

from experiments.configs import tiny
from experiments.run.config import Data, default_config, named_in_full, read_config
from transformer import Config, presets


@pytest.mark.parametrize("name", presets)
def test_a_preset_survives_being_a_config(name):
    config = read_config(default_config(presets[name]))
    assert config.architecture(presets[name].vocab_size) == presets[name]


def test_sizes_that_follow_from_others_do_so_still():
    small = Config(vocab_size=9, max_length=256, num_layers=1, width=32, num_heads=2)
    config = default_config(small)
    config.model.width = 64
    model = read_config(config).architecture(9)
    assert (model.shape.H, model.shape.F) == (32, 256)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("model", "widht", 3, "config.model has no field 'widht'; did you mean width"),
        ("model", "vocab_size", 3, "config.model has no field 'vocab_size'"),
        ("model", "window", (1, "2"), "window=.* is of type tuple; it must be int"),
        ("model", "rotary_scaling", {"kind": "ntk", "factor": 2, "bta": 1}, "no field 'bta'"),
        ("model", "rotary_scaling", {"kind": "ntk"}, "rotary_scaling lacks factor"),
        ("model", "latent", {"rank": 0}, "config.model.latent.rank=0; it must be at least 1"),
        ("model", "num_heads", 5, "config.model.width=64 must be a multiple of config.model.num"),
        ("optimizer", "clip_norm", True, "clip_norm=True is of type bool"),
        ("optimizer", "warmup_steps", -1, "config.optimizer.warmup_steps=-1; it must be 0 or more"),
        ("optimizer", "name", "sgd", "^config.optimizer.name='sgd' does not exist"),
        ("train", "ema_decay", "0.9", "ema_decay='0.9' is of type str"),
        ("optimizer", "transfer", 16, "transfer=16 goes with config.model.tie_embeddings=False"),
        ("train", "steps", 0, "config.train.steps=0; it must be at least 1"),
        ("train", "accumulate", 3, "batch_size=8 must be a multiple of config.train.accumulate=3"),
        ("train", "loss_parts", 7, "length=128 must be a multiple of config.train.loss_parts=7"),
        ("train", "seed", 2**40, r"train.seed=1099511627776; it must be between 0 and 2\*\*32 - 1"),
        ("train", "z_loss", float("nan"), "config.train.z_loss=nan; it must be 0 or more"),
        ("train", "attention", "fast", "attention backend 'fast' does not exist; choose .* xla"),
        ("data", "length", 257, "data.length=257 must be at most config.model.max_length=256"),
        ("data", "tokenizer", "words", "config.data.tokenizer='words' does not exist; choose byt"),
        ("checkpoint", "keep_best", -1, "config.checkpoint.keep_best=-1; it must be 0 or more"),
    ],
)
def test_a_config_with_a_wrong_field(section, name, value, message):
    config = tiny.get_config()
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        read_config(config)


def test_a_config_with_a_wrong_section():
    config = tiny.get_config()
    config.trian = {}
    with pytest.raises(ValueError, match="config has no field 'trian'; did you mean train"):
        read_config(config)
    with pytest.raises(ValueError, match="get_config returns 5; it must return a ConfigDict"):
        read_config(5)
    config = tiny.get_config()
    del config["train"]
    config.train = 3
    with pytest.raises(ValueError, match="train=3; it must be a section of fields"):
        read_config(config)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("seed=-1; it", "config.data.seed=-1; it"),
        ("data seed=-1", "config.data.seed=-1"),
        ("config.data.seed=-1", "config.data.seed=-1"),
        ("length=3 and batch_size=4", "config.data.length=3 and config.data.batch_size=4"),
        ("max_length=3, other.length=4, seeds=5", "max_length=3, other.length=4, seeds=5"),
        ("the length = 3", "the length = 3"),
    ],
)
def test_fields_are_named_in_full(text, full):
    with pytest.raises(ValueError) as error, named_in_full("data", Data):
        raise ValueError(text)
    assert str(error.value) == full
