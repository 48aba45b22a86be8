"""Sweeps: what is trained, and the table of it."""

import json
import sys

import pytest

from experiments import sweep


def test_every_combination_has_a_folder():
    points = sweep.combinations(["model.width=32 64", "optimizer.name=adamw"])
    assert points == {
        "model.width=32,optimizer.name=adamw": {"model.width": "32", "optimizer.name": "adamw"},
        "model.width=64,optimizer.name=adamw": {"model.width": "64", "optimizer.name": "adamw"},
    }
    together = sweep.combinations(["model.width,model.num_heads=32,4 64,8"])
    assert list(together.values()) == [
        {"model.width": "32", "model.num_heads": "4"},
        {"model.width": "64", "model.num_heads": "8"},
    ]
    for wrong in ("model.width", "=3", "a,b=1,2 3"):
        with pytest.raises(ValueError, match="give a field and its values"):
            sweep.combinations([wrong])


@pytest.fixture
def trained(monkeypatch):
    """In the place of training: what was asked for, each with a validation loss of its own."""
    runs = []

    def train(workdir, settings, flags):
        workdir.mkdir(parents=True, exist_ok=True)
        runs.append((settings, flags))
        loss = float(settings["model.width"]) % 5
        row = json.dumps({"step": 3, "validation_loss": loss})
        (workdir / "metrics.jsonl").write_text(row + "\n")
        return 0 if loss else 1

    monkeypatch.setattr(sweep, "train", train)
    return runs


def test_the_table_is_best_first(trained, monkeypatch, tmp_path, capsys):
    where = [f"--workdir={tmp_path}", f"--plot={tmp_path / 'sweep.png'}"]
    over = ["--over=model.width=33 31 34", *where, "--", "--config=c.py"]
    monkeypatch.setattr(sys, "argv", ["sweep", *over])
    sweep.main()
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["model.width"] for row in rows] == ["31", "33", "34"]
    assert [flags for _, flags in trained] == [["--config=c.py"]] * 3
    assert "1.0000" in capsys.readouterr().out


def test_a_run_that_fails_is_named(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "--over=model.width=30 31", f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "1 of 2 runs failed" in capsys.readouterr().err


def test_a_task_of_an_array_does_its_own(trained, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "--over=model.width=31 32", f"--workdir={tmp_path}"])
    for task in "12":
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        with pytest.raises(SystemExit):
            sweep.main()
    assert [settings for settings, _ in trained] == [{"model.width": "32"}]
    assert "ID=2, but there are 2 combinations" in capsys.readouterr().err
