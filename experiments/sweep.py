"""Trains once for each combination of some settings, and makes one table of the results.

    python -m experiments.sweep --workdir=runs/sweep \\
        --over='optimizer.learning_rate=1e-3 3e-3 1e-2' --over='model.width=32 64' \\
        -- --config=experiments/configs/tiny.py --config.train.steps=100

What follows -- goes to each run of `experiments.train`, which has a folder of its own in the work
directory. They run one after another, or as many at once as --jobs says; the same command goes on
where it was. As an array of Slurm (sbatch --array=0-5) each task trains one combination, and the
same command outside of Slurm then makes the table, which is in results.json too, best first.
--plot=FILE.svg draws the loss by the first field, with a line for each value of the others.
"""

import argparse
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.run import cli
from experiments.run.metrics import METRICS_FILE, DamagedRows, read_rows


def main():
    """Does the runs that are left to do, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--over", required=True, action="append", help="FIELD=VALUE VALUE ...")
    parser.add_argument("--jobs", default=1, type=int, help="How many runs at once.")
    parser.add_argument("--plot", type=Path, help="Draws the results into this SVG or PNG.")
    parser.add_argument("train", nargs="*", help="Flags of experiments.train, after --.")
    given = parser.parse_args()
    with cli.user_errors(ValueError):
        points = combinations(given.over)
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        if int(task) >= len(points):
            cli.fail(f"SLURM_ARRAY_TASK_ID={task}, but there are {len(points)} combinations.")
        chosen = list(points)[int(task)]
        sys.exit(train(given.workdir / chosen, points[chosen], given.train))
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {n: pool.submit(train, given.workdir / n, points[n], given.train) for n in points}
    failed = [name for name, run in runs.items() if run.result()]
    with cli.user_errors(DamagedRows):
        table = results(given.workdir, points)
    _print(table)
    if given.plot is not None and table:
        with cli.user_errors(OSError, ValueError):
            plot(table, list(next(iter(points.values()))), given.plot)
    if failed:
        cli.fail(
            f"{len(failed)} of {len(points)} runs failed, which say why in output.txt of "
            f"their folders: {', '.join(failed)}",
            status=1,
        )


def combinations(over: list[str]) -> dict[str, dict[str, str]]:
    """The settings of each run by the name of its folder.

    Args:
      over: texts as "optimizer.learning_rate=1e-3 3e-3", a field of the config and its values, or
        as "model.width,model.num_heads=32,4 64,8", fields that change together.

    Raises:
      ValueError: a text is no such thing.
    """
    points = [
        {name: value for setting in settings for name, value in setting.items()}
        for settings in itertools.product(*map(_settings, over))
    ]
    return {
        ",".join(f"{name}={value}" for name, value in point.items()).replace("/", "_"): point
        for point in points
    }


def _settings(text):
    """The settings that one text chooses from, each a dict of fields and their values."""
    name, _, values = text.partition("=")
    names = [part.strip() for part in name.split(",")]
    split = [value.split(",") if len(names) > 1 else [value] for value in values.split()]
    if not all(names) or not split or any(len(given) != len(names) for given in split):
        raise ValueError(
            f"--over={text!r}; give a field and its values, as 'model.width=32 64', or fields that "
            "change together, as 'model.width,model.num_heads=32,4 64,8'."
        )
    return [dict(zip(names, given, strict=True)) for given in split]


def train(workdir: Path, settings: dict[str, str], flags: list[str]) -> int:
    """Does one run, or goes on with it; what it prints goes to its output.txt. Its exit status."""
    workdir.mkdir(parents=True, exist_ok=True)
    settings = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *flags, *settings]
    with open(workdir / "output.txt", "w") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode


def results(workdir: Path, points: dict[str, dict[str, str]]) -> list[dict]:
    """The last validation of each run that has one, beside its settings, the best first.

    Raises:
      DamagedRows: the metrics of a run are damaged.
    """
    from transformer.files import write_json

    rows = []
    for name, point in points.items():
        validated = [r for r in read_rows(workdir / name / METRICS_FILE) if "validation_loss" in r]
        if validated:
            rows.append({**point, **validated[-1]})
    rows.sort(key=lambda row: row["validation_loss"])
    write_json(workdir / "results.json", rows)
    return rows


def plot(rows: list[dict], fields: list[str], path: Path) -> None:
    """Draws the validation loss by the first field, a line for each combination of the others.

    Raises:
      ValueError: a value of the first field is not a number.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    first, *others = fields
    lines = {}
    for row in rows:
        name = ", ".join(f"{field}={row[field]}" for field in others)
        lines.setdefault(name, []).append((float(row[first]), row["validation_loss"]))
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for name in sorted(lines, key=lambda name: (len(name), name)):
        axes.plot(*zip(*sorted(lines[name]), strict=True), marker="o", label=name)
    axes.set(xscale="log", xlabel=first, ylabel="validation loss")
    axes.grid(alpha=0.3)
    if others:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _print(rows):
    said = lambda x: f"{x:.4f}" if isinstance(x, float) else str(x)
    cli.print_table("", list(rows[0]) if rows else [], [map(said, row.values()) for row in rows])


if __name__ == "__main__":
    main()
