"""The shape of GPT-2 124M, for an accelerator."""

from experiments.run.config import default_config
from transformer.presets import presets


def get_config():
    config = default_config(presets["gpt2"].replace(dtype="bfloat16"))
    config.data.vocab_size = 50257
    config.data.batch_size = 32
    config.data.length = 1024
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 700
    config.train.steps = 20_000
    config.train.eval_every = 500
    config.train.sample_every = 1000
    config.checkpoint.every = 500
    return config
