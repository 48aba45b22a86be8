"""Trains a model: `python -m experiments.train --config=FILE --workdir=DIR`.

Single fields of the config are changed as --config.train.steps=N. Run again with the same work
directory, it goes on from the last checkpoint; SIGTERM and Ctrl-C save one and end the run.

The work directory holds config.json, tokenizer.json and checkpoints/ (`transformer.load` reads
these), experiment.json (the config), metrics.jsonl, tensorboard/, loss.png and samples.jsonl.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from experiments.run import cli
from experiments.run.config import read_config
from experiments.run.meter import Meter, NotFinite
from experiments.run.metrics import (
    METRICS_FILE,
    SAMPLES_FILE,
    DamagedRows,
    Log,
    Metrics,
    read_rows,
)
from experiments.run.process import StopSignals, only_process
from experiments.run.progress import Progress
from experiments.run.run import EXPERIMENT_FILE, Run, checkpoint_items, prepare
from transformer.inference.generate import generate
from transformer.storage.checkpoint import CheckpointError, Checkpoints
from transformer.storage.files import write_json
from transformer.storage.model import Model, write_description
from transformer.training.evaluation import evaluate, make_eval_step

_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/demo.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main(argv):
    """Prepares the run that the flags ask for, and does it unless it is finished."""
    del argv
    workdir = Path(_WORKDIR.value)
    cli.tell_attention()
    with cli.user_errors(ValueError, OSError, CheckpointError, NotImplementedError):
        run = prepare(read_config(_CONFIG.value), workdir)
    if run is not None:
        kinds = NotFinite, DamagedRows, OSError, CheckpointError, NotImplementedError
        with cli.user_errors(*kinds, status=1):
            step = train(run)
        if step < run.experiment.train.steps:
            print(f"stopped after step {step}; the same command goes on from there")
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


def train(run: Run) -> int:
    """Does the run, to its end or until SIGTERM or SIGINT; what came before is kept.

    Returns:
      The last step, whose state is saved.

    Raises:
      NotFinite: a loss, a gradient or a logit is no number; says at which step.
      NotImplementedError: the backend of attention can train, but not validate or sample.
      CheckpointError, OSError: something could not be written.
      DamagedRows: a file of rows in the work directory is damaged.
    """
    options, every = run.experiment.train, run.experiment.checkpoint.every
    run.workdir.mkdir(parents=True, exist_ok=True)
    kept = {
        "keep_last": run.experiment.checkpoint.keep_last,
        "keep_best": run.experiment.checkpoint.keep_best,
    }
    with (
        only_process(run.workdir),
        Checkpoints(run.workdir, **kept) as checkpoints,
        Metrics(run.workdir, run.start) as metrics,
        Log(run.workdir / SAMPLES_FILE, run.start) as samples,
        Progress(run.start, options.steps) as progress,
        StopSignals() as stop,
    ):
        write_json(run.workdir / EXPERIMENT_FILE, run.experiment.to_dict())
        write_description(run.workdir, run.model, run.tokenizer)
        checkpoints.discard_after(run.start)
        meter = Meter(run, metrics, progress)
        eval_step = make_eval_step(run.model, options.attention)
        state = run.state
        for step in range(run.start + 1, options.steps + 1):
            batch = next(run.batches)
            state, values = run.train_step(state, run.shard(batch))
            meter.push(step, values, batch)
            is_last = step == options.steps
            validates = is_last or step % options.eval_every == 0
            writes_sample = is_last or step % options.sample_every == 0
            saves = is_last or step % every == 0
            if not (validates or writes_sample or saves or stop.requested):
                continue
            validation, said = {}, []
            with meter.pause():
                averaged = state.params if state.ema is None else state.ema
                if validates:
                    sizes = run.tokenizer.byte_lengths
                    validation = evaluate(eval_step, averaged, run.validation, sizes)
                    metrics.write({"step": step, **validation})
                    bits = validation["validation_bits_per_byte"]
                    said.append(
                        f"step {step}/{options.steps}  validation loss "
                        f"{validation['validation_loss']:.4f}  {bits:.4f} bits per byte"
                    )
                if writes_sample:
                    text = sample(run, averaged, step)
                    samples.write({"step": step, "text": text})
                    said.append(f"sample after step {step}:\n{text}")
                stops = stop.requested  # from here on a signal waits for the next step
                if saves or stops:
                    # Rows first: a checkpoint that is there has all rows up to its step.
                    metrics.flush()
                    samples.flush()
                    remembered = {
                        "data": run.batches.get_state(),
                        "config": run.experiment.to_dict(),
                    }
                    loss = validation.get("validation_loss")
                    checkpoints.save(step, checkpoint_items(state), remembered, loss)
                for text in said:
                    progress.say(text)
            if stops:
                break
    return step


def sample(run: Run, params, step: int) -> str:
    """The beginning of a document as the model would write it after a step.

    Raises:
      NotFinite: the logits are no numbers.
    """
    options = run.experiment.train
    model = Model(run.model, jax.device_put(params, jax.devices()[0]), run.tokenizer)
    length = min(options.sample_length, run.model.max_length - 1)
    prompt = [run.tokenizer.end_of_document]
    try:
        [completion] = generate(
            model, [prompt], max_new_tokens=length, seed=step, attention=options.attention
        )
    except FloatingPointError as error:
        raise NotFinite(f"sample after step {step}: {error}") from error
    return completion.text


if __name__ == "__main__":
    cli.run(main)
