"""Reinforcement learning as people start it: the divergence is 0, to the bit."""

from functools import partial

import pytest

from experiments.run.metrics import METRICS_FILE, read_rows

SMALL = ["num_layers=1", "width=32", "num_heads=2", "feed_forward_width=64"]


@pytest.fixture
def program(run_program):
    # Equal bits are a claim about optimised code.
    return partial(run_program, "experiments.rl", XLA_FLAGS="")


def test_the_trainer_has_the_sampler_s_probabilities(program, tmp_path):
    result = program(
        f"--workdir={tmp_path}",
        *(f"--config.model.{field}" for field in SMALL),
        "--config.rl.prompts=2",
        "--config.rl.samples=3",
        "--config.train.steps=3",
        "--config.train.log_every=1",
    )
    assert result.returncode == 0, result.stderr
    for row in read_rows(tmp_path / METRICS_FILE):
        assert row["kl"] == 0 and row["smallest_ratio"] == row["largest_ratio"] == 1
    assert "KL 0  ratios from 1 to 1" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("finished after step 3: reward ")


def test_wrong_use_is_one_line(program, tmp_path):
    result = program(f"--workdir={tmp_path}", "--config.rl.task=chess")
    assert result.returncode == 2 and not result.stdout
    [line] = result.stderr.splitlines()
    assert line.startswith("error: config.rl.task='chess' does not exist; choose one of")
