"""What a run writes into its work directory and on the terminal, whatever it trains for."""

import contextlib
import errno
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.run.changes import EXPERIMENT_FILE
from experiments.run.config import Experiment
from experiments.run.metrics import SAMPLES_FILE, Log, Metrics
from experiments.run.prepare import checkpoint_items
from experiments.run.process import exclusive
from experiments.run.progress import Progress
from transformer.config import Config
from transformer.data.tokenizer import Tokenizer
from transformer.devices import hosts
from transformer.files import write_json
from transformer.storage.arrays import checksum
from transformer.storage.checkpoint import Checkpoints
from transformer.storage.model import write_description


class Outputs:
    """The files of a work directory, which nobody else writes, and the progress shown.

    Attributes:
      metrics, samples: rows of numbers and of texts, by step.
      progress: what the terminal shows.
    """

    def __init__(
        self,
        workdir: Path,
        experiment: Experiment,
        model: Config,
        tokenizer: Tokenizer,
        start: int,
        opened: contextlib.ExitStack,
    ):
        """Opens the files to go on after the step `start`; they are closed with the stack."""
        self._experiment, self._said, self._base = experiment, [], None
        kept = experiment.checkpoint
        workdir.mkdir(parents=True, exist_ok=True)
        # One process writes what people read; the others write theirs where it is thrown away.
        own = workdir if hosts.is_main() else Path(opened.enter_context(TemporaryDirectory()))
        opened.enter_context(exclusive(own))
        self._checkpoints = opened.enter_context(
            Checkpoints(workdir, keep_last=kept.keep_last, keep_best=kept.keep_best)
        )
        self.metrics = opened.enter_context(Metrics(own, start))
        self.samples = opened.enter_context(Log(own / SAMPLES_FILE, start))
        self.progress = opened.enter_context(Progress(start, experiment.train.steps))
        write_json(own / EXPERIMENT_FILE, experiment.to_dict())
        write_description(own, model, tokenizer)
        hosts.wait("the first process has written the config")
        if not (workdir / EXPERIMENT_FILE).exists():
            why = "the first process wrote it, and this one does not see it; give a folder for all"
            raise FileNotFoundError(errno.ENOENT, why, str(workdir / EXPERIMENT_FILE))
        self._checkpoints.discard_after(start)

    def save(self, step: int, state, data, loss: float | None = None) -> None:
        """Begins to save the state after a step, and that of the data.

        Args:
          loss: the smaller, the better the checkpoint; None: it is not compared.
        """
        # Rows first: a checkpoint that is there has all rows up to its step.
        self.metrics.flush()
        self.samples.flush()
        remembered = {"data": data, "config": self._experiment.to_dict()}
        if state.base is not None:
            self._base = self._base or checksum(state.base)
            remembered["base"] = self._base
        self._checkpoints.save(step, checkpoint_items(state), remembered, loss)

    def say(self, text: str) -> None:
        """Keeps a text for `report`."""
        self._said.append(text)

    def report(self) -> None:
        """Prints what there is to say: last, so that what is said to be done is done."""
        for text in self._said:
            self.progress.say(text)
        self._said.clear()
