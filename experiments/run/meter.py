"""The results of the steps of a run, made into rows of metrics."""

import math
import time
from collections import deque
from contextlib import contextmanager

import jax
import numpy as np

from experiments.run.metrics import Metrics
from experiments.run.prepare import TrainingRun
from experiments.run.progress import Progress
from transformer.data.batches import Batch
from transformer.devices import hosts
from transformer.training.flops import flops_per_token, peak_flops
from transformer.training.optimizer import learning_rate

# Steps given to the device before the result of the oldest is waited for: the host's work hides
# behind the device's, and a stop or a loss that is no number is noticed soon.
IN_FLIGHT = 2


class NotFinite(Exception):
    """The loss, its gradient or the logits of the model are no longer finite numbers."""


class Meter:
    """Turns the results of steps into rows of metrics, a few steps late."""

    def __init__(self, run: TrainingRun, metrics: Metrics, progress: Progress):
        self._metrics, self._progress = metrics, progress
        self._steps, self._log_every = run.experiment.train.steps, run.experiment.train.log_every
        self._learning_rate = learning_rate(run.experiment.optimizer, self._steps)
        self._byte_lengths = run.tokenizer.byte_lengths
        devices = run.state.step.sharding.device_set
        peaks = [peak_flops(device) for device in devices]
        self._peak = None if None in peaks else sum(peaks)
        self._flops = flops_per_token(run.model, run.experiment.data.length)
        self._pending = deque()
        self._tokens, self._since = 0, time.perf_counter()
        self._workdir = run.workdir

    def push(self, step: int, values: dict, batch: Batch) -> None:
        """Takes a step that was given to the device, and writes those before that are done."""
        self._pending.append((step, values, batch))
        while len(self._pending) > IN_FLIGHT:
            self._settle()

    @contextmanager
    def pause(self):
        """Writes all steps so far, and leaves the body's time out of tokens per second."""
        while self._pending:
            self._settle()
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _settle(self):
        step, values, batch = self._pending.popleft()
        values = jax.device_get(values)
        if not values["finite"]:
            raise NotFinite(
                f"step {step}: the loss is {values['loss']} and the gradient's norm is "
                f"{values['gradient_norm']}; stopped. A lower learning rate or a longer warm-up "
                f"may help; {self._workdir} keeps the checkpoints of earlier steps, if any."
            )
        self._tokens += batch.tokens.size
        self._progress.advance(step)
        if step % self._log_every == 0 or step == self._steps:
            self._write(step, values, batch)

    def _write(self, step, values, batch):
        now = time.perf_counter()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        loss = float(values["loss"])
        targets, weights = hosts.gather((batch.targets, batch.weights))
        size = np.sum(self._byte_lengths[targets] * weights)
        row = {
            "step": step,
            "loss": loss,
            "gradient_norm": float(values["gradient_norm"]),
            "learning_rate": float(self._learning_rate(step - 1)),
            "tokens_per_second": rate,
            "bits_per_byte": loss * float(np.sum(weights) / size) / math.log(2),
        }
        if self._peak is not None:
            row["mfu"] = rate * self._flops / self._peak
        self._metrics.write(row)
        self._progress.show(row, (self._steps - step) * batch.tokens.size / rate)
