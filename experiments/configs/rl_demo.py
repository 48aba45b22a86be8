"""A small policy that learns to sort digits from rewards alone, in minutes on two CPU cores."""

from experiments.run.config import default_config
from experiments.run.rl_config import RlExperiment
from transformer.config import Config


def get_config():
    model = Config(
        vocab_size=257,
        max_length=64,
        num_layers=2,
        width=64,
        num_heads=4,
        feed_forward_width=160,
    )
    config = default_config(model, RlExperiment)
    config.data.tokenizer = "bytes"
    config.data.length = 32
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.0
    config.train.steps = 400
    config.train.numerics = "exact"
    config.train.log_every = 20
    config.checkpoint.every = 100
    return config
