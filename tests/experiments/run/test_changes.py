"""What differs between the configs of a run that is continued."""

import json

from experiments.run.changes import changes, explain_layout, report_changes
from transformer.storage.checkpoint import LayoutError


def test_changes_name_fields_with_before_and_now(experiment):
    before = json.loads(json.dumps(experiment(model__window=(3, None)).to_dict()))
    assert changes(before, experiment(model__window=(3, None))) == {}
    now = experiment(model__window=(3, None), train__steps=9, optimizer__name="muon")
    assert changes(before, now) == {
        "train.steps": (160, 9),
        "optimizer.name": ("adamw", "muon"),
    }


def test_changes_are_printed(experiment, tmp_path, capsys):
    report_changes(tmp_path, experiment())  # never started before
    (tmp_path / "experiment.json").write_text(json.dumps(experiment().to_dict()))
    report_changes(tmp_path, experiment(train__steps=9))
    assert capsys.readouterr().out == (
        "changed since the run was last started: config.train.steps: 160 -> 9\n"
    )


def test_only_settings_that_lay_arrays_out_are_to_blame(experiment):
    before = experiment(train__ema_decay=None).to_dict()
    now = experiment(optimizer__learning_rate=3.0, optimizer__name="muon")

    def explain(item, experiment):
        error = LayoutError("It differs.", item, {"config": before})
        return explain_layout(error, experiment)

    assert explain("optimizer_state", now) == (
        "It differs. config.optimizer.name was adamw and is muon. Go on with "
        "--config.optimizer.name=adamw, or begin anew in another --workdir."
    )
    assert "Go on with --config.train.ema_decay=None," in explain("ema", now)
    assert "Another version of Unison saved it" in explain("params", now)
