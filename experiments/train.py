"""Trains a model: `python -m experiments.train --config=FILE --workdir=DIR`.

Flags as --config.train.steps=N change single fields of the config. Run again with the same work
directory, it goes on from the last checkpoint; SIGTERM and Ctrl-C save one and end the run.

The work directory holds config.json, tokenizer.json and checkpoints/ (`transformer.load` reads
these), experiment.json (the config), metrics.jsonl, tensorboard/, loss.png and samples.jsonl.
"""

import contextlib
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from experiments.run import cli
from experiments.run.config import read_config
from experiments.run.meter import Meter, NotFinite
from experiments.run.metrics import METRICS_FILE, DamagedRows, read_rows
from experiments.run.outputs import Outputs
from experiments.run.prepare import TrainingRun, prepare
from experiments.run.profile import Profile
from experiments.run.signals import StopSignals
from transformer.devices import hosts
from transformer.devices.layout import shard_batch
from transformer.inference.generate import generate
from transformer.storage.checkpoint import CheckpointError
from transformer.storage.model import Model
from transformer.training.evaluation import evaluate, make_eval_step
from transformer.training.lora import merged

with cli.flag_errors():
    _CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/demo.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Joins the processes that Slurm, Open MPI, Kubernetes or a TPU started."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for processes started by hand."
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, steps to trace into the work directory, for xprof or TensorBoard."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def main(argv):
    """Prepares the run that the flags ask for, and does it unless it is finished."""
    del argv
    cli.outlive_readers()
    cli.print_notices()
    by_hand = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if _DISTRIBUTED.value or any(value is not None for value in by_hand):
        with cli.user_errors(ValueError, RuntimeError):
            hosts.join(*by_hand)
        if not hosts.is_main():
            cli.silence()
    with hosts.failing_at_once():
        _run(Path(_WORKDIR.value))


def _run(workdir):
    with cli.user_errors(ValueError):
        profile = Profile(_PROFILE.value, workdir / "profile")
    with cli.flag_errors():
        _CONFIG.value.keys()  # where its file could not be read, ml_collections says so only now
    with cli.user_errors(ValueError, OSError, CheckpointError, NotImplementedError):
        run = prepare(read_config(_CONFIG.value), workdir)
    if run is not None:
        kinds = NotFinite, DamagedRows, OSError, CheckpointError, NotImplementedError
        with cli.user_errors(*kinds, status=1):
            step = train(run, profile)
        if step < run.experiment.train.steps:
            print(f"stopped after step {step}; the same command goes on from there")
            return
    if not hosts.is_main():
        return
    with cli.user_errors(DamagedRows):
        validated = [row for row in read_rows(workdir / METRICS_FILE) if "validation_loss" in row]
    if not validated:
        cli.fail(
            f"the run is finished and the model is in {workdir}, but its {METRICS_FILE} has no "
            "validation."
        )
    last = validated[-1]
    print(
        f"finished after step {last['step']}: validation loss {last['validation_loss']:.4f}, "
        f"{last['validation_bits_per_byte']:.4f} bits per byte; the model is in {workdir}"
    )


def train(run: TrainingRun, profile: Profile | None = None) -> int:
    """Does the run, to its end or until SIGTERM or SIGINT; what was there before is kept.

    Returns:
      The last step, whose state is saved.

    Raises:
      NotFinite: a loss, a gradient or a logit is not finite; says at which step.
      NotImplementedError: the backend of attention can train, but not validate or sample.
      CheckpointError, OSError: something could not be written.
      DamagedRows: a file of rows in the work directory is damaged.
    """
    options, every = run.experiment.train, run.experiment.checkpoint.every
    hosts.wait("before a process writes what another one has yet to read")
    with contextlib.ExitStack() as opened, StopSignals() as stop, jax.set_mesh(run.mesh):
        out = _Outputs(run, opened)
        profile = opened.enter_context(profile or Profile(None, run.workdir))
        state = run.state
        for step in range(run.start + 1, options.steps + 1):
            batch = run.shard(next(run.batches))
            profile.before(step)
            state, values = run.train_step(state, batch)
            profile.after(step, values)
            out.meter.push(step, values, batch)
            is_last = step == options.steps
            validates = is_last or step % options.eval_every == 0
            samples = is_last or step % options.sample_every == 0
            saves = is_last or step % every == 0
            loss = None
            if validates or samples:
                with out.meter.pause():
                    averaged = merged(state.base, state.params if state.ema is None else state.ema)
                    if validates:
                        loss = out.validate(step, averaged)
                    if samples:
                        out.sample(step, averaged)
            stops = stop.requested_after(step)  # from here on a signal waits for the next step
            if saves or stops:
                with out.meter.pause():
                    out.save(step, state, run.batches.get_state(), loss)
            out.report()
            if stops:
                break
    return step


class _Outputs(Outputs):
    """What a training run writes, also about its validations and samples."""

    def __init__(self, run: TrainingRun, opened: contextlib.ExitStack):
        """Opens the files of the work directory, which are closed with the stack."""
        super().__init__(run.workdir, run.experiment, run.model, run.tokenizer, run.start, opened)
        self._run = run
        self.meter = Meter(run, self.metrics, self.progress)
        options = run.experiment.train
        eval_step = make_eval_step(
            run.model, options.attention, options.numerics, options.loss_parts
        )
        self._eval_step = lambda params, batch: hosts.gather(
            eval_step(params, shard_batch(run.mesh, batch))
        )

    def validate(self, step: int, params) -> float:
        """Evaluates parameters after a step, and returns the validation loss."""
        run = self._run
        row = evaluate(self._eval_step, params, run.validation, run.tokenizer.byte_lengths)
        self.metrics.write({"step": step, **row})
        self.say(
            f"step {step}/{run.experiment.train.steps}  validation loss "
            f"{row['validation_loss']:.4f}  {row['validation_bits_per_byte']:.4f} bits per byte"
        )
        return row["validation_loss"]

    def sample(self, step: int, params) -> None:
        """Writes down how the model begins a document after a step."""
        text = sample(self._run, params, step)
        self.samples.write({"step": step, "text": text})
        self.say(f"sample after step {step}:\n{text}")


def sample(run: TrainingRun, params, step: int) -> str:
    """Returns the beginning of a document as the model would write it after a step.

    Raises:
      NotFinite: the logits are not finite.
    """
    options = run.experiment.train
    model = Model(run.model, params, run.tokenizer)
    length = min(options.sample_length, run.model.max_length - 1)
    prompt = run.tokenizer.document_start
    try:
        [completion] = generate(
            model,
            [prompt],
            max_new_tokens=length,
            seed=step,
            numerics=options.numerics,
            attention=options.attention,
        )
    except FloatingPointError as error:
        raise NotFinite(f"sample after step {step}: {error}") from error
    return completion.text


if __name__ == "__main__":
    cli.start(main, one_heap=True)
