"""The config of reinforcement learning: that of training, with one more section."""

from dataclasses import dataclass, field

from experiments.run.config import Experiment
from experiments.run.tasks import TASKS


@dataclass(frozen=True)
class Rl:
    """What the policy is asked.

    task: one of `experiments.run.tasks.TASKS`.
    size: how many digits it is about.
    prompts, samples: tasks of a step, and answers to each of them.
    """

    task: str = "sorting"
    size: int = 3
    prompts: int = 16
    samples: int = 8

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} does not exist; choose one of {list(TASKS)}.")
        for name, least in (("size", 1), ("prompts", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class RlExperiment(Experiment):
    """A config with the section `rl`; of the corpus, only the seed of `data` is used."""

    rl: Rl = field(default_factory=Rl)
