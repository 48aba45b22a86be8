"""A model that trains in seconds: for tests, and for trying things."""

from experiments.run.config import default_config
from transformer.presets import presets


def get_config():
    config = default_config(presets["tiny"])
    config.data.tokenizer = "bytes"
    config.data.length = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 10
    config.train.steps = 200
    config.train.eval_every = 100
    config.train.sample_every = 100
    config.checkpoint.every = 100
    return config
