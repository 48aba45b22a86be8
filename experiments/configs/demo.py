"""A small model of the default corpus, for two CPU cores: what `make demo` trains."""

from experiments.run.config import default_config
from transformer.config import Config


def get_config():
    model = Config(
        vocab_size=2048,
        max_length=1024,
        num_layers=4,
        width=256,
        num_heads=4,
        feed_forward_width=688,
        qk_norm=True,
    )
    config = default_config(model)
    config.data.vocab_size = 2048
    config.data.batch_size = 8
    config.data.length = 256
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.train.steps = 400
    config.train.eval_every = 200
    config.train.sample_every = 400
    config.checkpoint.every = 200
    return config
