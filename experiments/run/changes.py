"""What differs between the config that a run was begun with and the one it is to go on with."""

import contextlib
import json
from pathlib import Path

from experiments.run.config import Experiment
from transformer.storage.checkpoint import LayoutError

EXPERIMENT_FILE = "experiment.json"

# Where the settings are that say how an item of a checkpoint is laid out.
_SETTINGS_OF = {
    "optimizer_state": ("optimizer.", "lora."),
    "ema": "train.ema_decay",
    "params": "model.",
    "adapters": "lora.",
    "adapters_ema": "train.ema_decay",
}


def changes(before: dict, experiment: Experiment) -> dict[str, tuple]:
    """The fields of two configs that differ, as `train.steps`: (before, now)."""
    now = json.loads(json.dumps(experiment.to_dict()))  # tuples are lists, as in `before`
    return {
        f"{section}.{name}": (before[section].get(name), value)
        for section in before
        for name, value in now.get(section, {}).items()
        if before[section].get(name) != value
    }


def report_changes(workdir: Path, experiment: Experiment) -> None:
    """Prints which settings differ from those that the run had when it was last started."""
    for name, (before, now) in changes(_before(workdir), experiment).items():
        print(f"changed since the run was last started: config.{name}: {before} -> {now}")


def require_same_tokenizer(workdir: Path, experiment: Experiment) -> None:
    """Refuses to go on with another tokenizer than that of the work directory.

    Raises:
      ValueError: names the setting that changed.
    """
    before = _before(workdir)
    kinds = {before.get("data", {}).get("tokenizer"), experiment.data.tokenizer}
    changed = changes(before, experiment)
    for name in ("data.tokenizer", "data.vocab_size"):
        if name in changed and kinds != {"bytes"}:  # which have no size to choose
            was, is_now = changed[name]
            raise ValueError(
                f"config.{name} ({was} -> {is_now}) cannot change within a run, whose tokenizer is "
                f"in {workdir}; use another work directory."
            )


def explain_layout(error: LayoutError, experiment: Experiment) -> str:
    """Says which settings keep a run from going on with a checkpoint, and what to do."""
    changed = {
        name: values
        for name, values in changes(error.metadata["config"], experiment).items()
        if name.startswith(_SETTINGS_OF[error.item])
        # A number that has become another one lays nothing out otherwise, but for the rank.
        and (name == "lora.rank" or not all(type(value) in (int, float) for value in values))
    }
    if not changed:
        return f"{error} Another version of Unison saved it; begin anew in another --workdir."
    culprits = ", ".join(
        f"config.{name} was {before} and is {now}" for name, (before, now) in changed.items()
    )
    remedy = " ".join(f"--config.{name}={before}" for name, (before, _) in changed.items())
    return f"{error} {culprits}. Go on with {remedy}, or begin anew in another --workdir."


def _before(workdir):
    """The config that a run was last started with; none where it never was."""
    path = workdir / EXPERIMENT_FILE
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError):
        sections = json.loads(path.read_text())
        if isinstance(sections, dict) and all(isinstance(s, dict) for s in sections.values()):
            return sections
    raise ValueError(f"{path} is damaged; remove it, and the run goes on with the config given.")
