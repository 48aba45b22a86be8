"""Reinforcement learning: `python -m experiments.rl --config=FILE --workdir=DIR`.

A policy learns tasks whose answers a program checks. The trainer takes the log-probabilities that
the sampler reports as they are: in exact numerics both are the same computation, so the estimate of
the divergence is 0 and every importance ratio 1, at every step.

Flags, stopping, resuming and what the work directory holds are as in `experiments.train`; in
metrics.jsonl there are also `reward`, `kl`, `largest_ratio` and `smallest_ratio`.

    python -m experiments.rl --plot=rl.png --workdir='runs/rl-*'     draws runs that are there
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments.run import cli
from experiments.run.config import read_config
from experiments.run.meter import NotFinite
from experiments.run.metrics import METRICS_FILE, DamagedRows, read_rows
from experiments.run.prepare import shorten_warmup
from experiments.run.rl import plot, train
from experiments.run.rl_config import RlExperiment
from transformer.storage.checkpoint import CheckpointError

with cli.flag_errors():
    _CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/rl_demo.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_PLOT = flags.DEFINE_string(
    "plot", None, "Draws the runs of the glob --workdir into this file, .png or .svg."
)


def main(argv):
    """Does the run that the flags ask for, or draws runs."""
    del argv
    if _PLOT.value is not None:
        with cli.user_errors(DamagedRows, OSError, ValueError):
            plot(_WORKDIR.value, Path(_PLOT.value))
        return
    workdir = Path(_WORKDIR.value)
    cli.outlive_readers()
    cli.print_notices()
    with cli.flag_errors():
        _CONFIG.value.keys()  # where its file could not be read, ml_collections says so only now
    with cli.user_errors(ValueError, OSError, CheckpointError):
        experiment = shorten_warmup(read_config(_CONFIG.value, RlExperiment))
    kinds = NotFinite, DamagedRows, OSError, CheckpointError, NotImplementedError, ValueError
    with cli.user_errors(*kinds, status=1):
        step = train(experiment, workdir)
    last = experiment.train.steps
    if step < last:
        print(f"stopped after step {step}; the same command goes on from there")
    else:
        row = read_rows(workdir / METRICS_FILE)[-1]
        print(f"finished after step {last}: reward {row['reward']:.3f}, KL {row['kl']:.2g}")


if __name__ == "__main__":
    cli.start(main, one_heap=True)
