"""Reinforcement learning: the trainer's probabilities are the sampler's, and runs go on."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.configs import rl_demo
from experiments.run.config import read_config
from experiments.run.metrics import METRICS_FILE, read_rows
from experiments.run.rl import plot, train
from experiments.run.rl_config import Rl, RlExperiment
from experiments.run.rollouts import draw
from transformer import Model, init_params, load
from transformer.data.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def experiment():
    config = rl_demo.get_config()
    config.model.update(num_layers=1, width=32, num_heads=2, feed_forward_width=64)
    config.rl.update(prompts=2, samples=3)
    config.train.update(steps=2, log_every=1, numerics="fast")  # exact ones compile for longer
    config.optimizer.warmup_steps = 0
    config.checkpoint.every = 1
    return read_config(config, RlExperiment)


def test_a_run_goes_on_and_its_ratios_are_one(experiment, tmp_path, monkeypatch):
    """Stopped after the first step and continued, it makes the rows of one that was not stopped."""
    assert train(experiment, tmp_path / "whole") == 2
    rows = read_rows(tmp_path / "whole" / METRICS_FILE)
    for row in rows:
        # Rounding of float32; in exact numerics bits are equal: tests/experiments/test_rl.py.
        assert abs(row["kl"]) < 1e-6
        assert 1 - 1e-4 < row["smallest_ratio"] <= row["largest_ratio"] < 1 + 1e-4

    class Stopped:
        requested_after = lambda self, step: True
        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None

    with monkeypatch.context() as patched:
        patched.setattr("experiments.run.rl.StopSignals", Stopped)
        assert train(experiment, tmp_path / "stopped") == 1
    assert train(experiment, tmp_path / "stopped") == 2
    without_time = lambda rows: [row | {"tokens_per_second": 0} for row in rows]
    again = read_rows(tmp_path / "stopped" / METRICS_FILE)
    assert without_time(again) == without_time(rows)
    one, other = (load(tmp_path / name).params for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    plot(str(tmp_path / "*"), tmp_path / "rl.png")
    assert (tmp_path / "rl.png").stat().st_size > 1000


def test_advantages_are_against_the_other_answers(experiment):
    config = experiment.architecture(257)
    model = Model(config, init_params(config, jax.random.key(0)), byte_tokenizer())
    rollouts, mean, text = draw(model, experiment, 7)
    assert rollouts.advantages.shape == rollouts.batch.tokens.shape
    assert np.abs(rollouts.advantages).max() <= 1
    assert not rollouts.advantages[rollouts.batch.weights == 0].any()
    assert rollouts.batch.weights.sum() <= 2 * 3 * 3 and 0 <= mean <= 1 and ">" in text
    assert (rollouts.logprobs[rollouts.batch.weights > 0] < 0).all()
    assert not rollouts.logprobs[rollouts.batch.weights == 0].any()


def test_fields_are_checked():
    with pytest.raises(ValueError, match="task='chess' does not exist; choose one of"):
        Rl(task="chess")
    with pytest.raises(ValueError, match="samples=1; it must be at least 2"):
        dataclasses.replace(Rl(), samples=1)


def test_no_runs_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no run is there"):
        plot(str(tmp_path / "*"), tmp_path / "rl.png")
