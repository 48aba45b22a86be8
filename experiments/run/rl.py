"""A run of reinforcement learning, from its start or its last checkpoint, and a picture of runs."""

import contextlib
import glob
import json
import time
from functools import partial
from pathlib import Path

import jax

from experiments.run.changes import EXPERIMENT_FILE, report_changes
from experiments.run.config import named_in_full
from experiments.run.meter import NotFinite
from experiments.run.metrics import METRICS_FILE, read_rows
from experiments.run.outputs import Outputs
from experiments.run.prepare import restore
from experiments.run.rl_config import RlExperiment
from experiments.run.rollouts import draw, make_rl_step
from experiments.run.signals import StopSignals
from transformer.data.tokenizer import byte_tokenizer
from transformer.devices.layout import state_shardings
from transformer.devices.mesh import make_mesh
from transformer.files import naming
from transformer.storage.checkpoint import FOLDER
from transformer.storage.model import CONFIG_FILE, Model, require_same_architecture
from transformer.training.optimizer import OptimizerConfig, make_optimizer, transferred
from transformer.training.step import init_state


def train(experiment: RlExperiment, workdir: Path) -> int:
    """Does the run, to its end or until SIGTERM or SIGINT; returns the last step, which is saved.

    Raises:
      NotFinite: a loss, a gradient or a logit is not finite.
      ValueError: the work directory holds another model.
      CheckpointError, OSError, DamagedRows: as in `experiments.train`.
    """
    options, tokenizer = experiment.train, byte_tokenizer()
    config = experiment.architecture(tokenizer.vocab_size)
    if (workdir / CONFIG_FILE).exists():
        require_same_architecture(workdir, config)
        report_changes(workdir, experiment)
    with named_in_full("optimizer", OptimizerConfig):
        optimizer = make_optimizer(experiment.optimizer, options.steps, config.width)
    rl_step = make_rl_step(
        config, optimizer, numerics=options.numerics, attention=options.attention
    )
    key = jax.random.key(options.seed)
    prepared = partial(transferred, experiment.optimizer)
    init = partial(init_state, config, optimizer, prepared=prepared)
    start, state = 0, None
    if (workdir / FOLDER).exists():
        abstract = jax.eval_shape(init, key)
        shardings = state_shardings(make_mesh("data=1"), abstract)
        start, state, _ = restore(workdir, abstract, shardings, experiment)
    state = init(key) if state is None else state
    if start >= options.steps:
        return start

    began, drawn_since, step = time.perf_counter(), 0, start
    with contextlib.ExitStack() as opened, StopSignals() as stop:
        out = Outputs(workdir, experiment, config, tokenizer, start, opened)
        for step in range(start + 1, options.steps + 1):
            rollouts, reward, text = _draw(Model(config, state.params, tokenizer), experiment, step)
            state, values = rl_step(state, rollouts)
            values = jax.device_get(values)
            if not values.pop("finite"):
                raise NotFinite(f"step {step}: the loss or its gradient is not finite; stopped.")
            drawn_since += rollouts.batch.tokens.size
            last, stops = step == options.steps, stop.requested_after(step)
            if last or step % options.log_every == 0:
                rate = drawn_since / (time.perf_counter() - began)
                row = {"step": step, "reward": reward, "tokens_per_second": rate}
                row |= {name: float(value) for name, value in values.items()}
                out.metrics.write(row)
                out.samples.write({"step": step, "text": text})
                seconds_left = (time.perf_counter() - began) / (step - start)
                out.progress.show(row, seconds_left * (options.steps - step))
                out.progress.say(
                    f"  reward {reward:.3f}  KL {row['kl']:.2g}  ratios from "
                    f"{row['smallest_ratio']:.9g} to {row['largest_ratio']:.9g}  {text!r}"
                )
            if last or stops or step % experiment.checkpoint.every == 0:
                out.save(step, state, {})
            if stops:
                break
    return step


def _draw(model, experiment, step):
    try:
        return draw(model, experiment, step)
    except FloatingPointError as error:
        raise NotFinite(f"step {step}: {error}") from error


def plot(pattern: str, path: Path) -> None:
    """Draws reward, divergence and largest ratio by step, a line for each run, a color for a kind.

    Raises:
      ValueError: no run is there.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folders = map(Path, sorted(glob.glob(pattern)))
    runs = {folder: read_rows(folder / METRICS_FILE) for folder in folders}
    runs = {folder: rows for folder, rows in runs.items() if rows}
    if not runs:
        raise ValueError(f"--workdir={pattern}: no run is there to be drawn.")
    colors = {}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    pictures = {
        "reward": lambda row: row["reward"],
        "KL": lambda row: row["kl"],
        "|ratio - 1|": lambda row: max(row["largest_ratio"] - 1, 1 - row["smallest_ratio"]),
    }
    for axis, (name, value) in zip(axes, pictures.items(), strict=True):
        for folder, rows in runs.items():
            kind = _kind(folder)
            color = colors.setdefault(kind, f"C{len(colors)}")
            steps = [row["step"] for row in rows]
            axis.plot(steps, list(map(value, rows)), color=color, lw=1, label=kind)
        if name != "reward":
            axis.set_yscale("symlog", linthresh=1e-9)
        axis.set(xlabel="step", title=name)
        axis.grid(alpha=0.3)
    lines = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    axes[0].legend(lines.values(), lines)
    with naming(path):
        figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _kind(folder):
    experiment = json.loads((folder / EXPERIMENT_FILE).read_text())
    return f"{experiment['train']['numerics']} {experiment['model']['dtype']}"
