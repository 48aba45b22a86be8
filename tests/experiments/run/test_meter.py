"""Metrics of the steps of a run."""

import numpy as np

from experiments.run.metrics import METRICS_FILE, read_rows
from experiments.run.prepare import prepare
from experiments.train import train
from kernels.backends.choice import AUTO
from transformer.training.flops import flops_per_token


def test_a_run_on_a_chosen_backend_of_attention_says_its_mfu(experiment, tmp_path, monkeypatch):
    # "auto" would fail.
    monkeypatch.setattr("kernels.backends.choice.AUTO", dict.fromkeys(AUTO, ()))
    monkeypatch.setattr("experiments.run.meter.peak_flops", lambda device: 1e12)
    changes = {"train__steps": 2, "optimizer__warmup_steps": 1, "train__attention": "reference"}
    run = prepare(experiment(**changes), tmp_path)
    assert train(run) == 2
    rows = [row for row in read_rows(tmp_path / METRICS_FILE) if "loss" in row]
    flops = flops_per_token(run.model, run.experiment.data.length)
    assert len(rows) == 2
    for row in rows:
        np.testing.assert_allclose(row["mfu"], row["tokens_per_second"] * flops / 1e12)
