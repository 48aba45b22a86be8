"""The shapes of Llama 3, for many devices: --config=experiments/configs/llama.py:llama-8b."""

from experiments.run.config import default_config
from transformer.presets import presets


def get_config(name="llama-1b"):
    config = default_config(presets[name].replace(scan_layers=True, remat="segments"))
    config.data.vocab_size = 128256
    config.data.batch_size = 256
    config.data.length = 4096
    config.devices.mesh = "fsdp=-1"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.train.steps = 100_000
    config.train.loss_parts = 16
    config.train.eval_every = 1000
    config.train.sample_every = 1000
    config.checkpoint.every = 1000
    return config
