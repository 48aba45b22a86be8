"""Rows of numbers by step: in a file of JSON lines, in TensorBoard, and as a picture."""

import contextlib
import json
import os
from pathlib import Path

from experiments.run.tensorboard import TensorBoard
from transformer.files import naming, write_text

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


class DamagedRows(ValueError):
    """A file of rows that holds something else."""


class Log:
    """A file with one JSON object a line, each with its `step`. A context manager."""

    def __init__(self, path: Path, step: int):
        """Opens the file to go on after a step: what came later is cut off in one atomic step."""
        self._path = path
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_text(path, "".join(_line(row) for row in kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with naming(self._path):
            self._file.close()

    def write(self, row: dict) -> None:
        """Appends a row."""
        with naming(self._path):
            self._file.write(_line(row))

    def flush(self) -> None:
        """Returns once the rows are on disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())


def _line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[dict]:
    """Reads the rows of a file: none if it is missing, and without a last line that was cut off.

    Raises:
      DamagedRows: a line is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def _row(path, number, line):
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    text = line[:60].decode(errors="replace")
    raise DamagedRows(
        f"{path}, line {number}: {text!r} is not a row of a run; mend the line or remove it."
    )


class Metrics:
    """The metrics of a run in its work directory: `metrics.jsonl`, `tensorboard/`, `loss.png`.

    A context manager, which draws the picture when left without an error.
    """

    def __init__(self, workdir: Path, step: int):
        """Goes on after a step."""
        self._path = workdir / METRICS_FILE
        self._picture = workdir / "loss.png"
        with contextlib.ExitStack() as opened:
            self._log = opened.enter_context(Log(self._path, step))
            self._tensorboard = opened.enter_context(TensorBoard(workdir / "tensorboard", step))
            self._opened = opened.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._opened.__exit__(*error)
        if error[0] is None:
            plot_loss(read_rows(self._path), self._picture)

    def write(self, row: dict) -> None:
        """Adds a row: `step` and numbers."""
        self._log.write(row)
        self._tensorboard.write(row)

    def flush(self) -> None:
        """Returns once all rows are on disk."""
        self._log.flush()


def plot_loss(rows: list[dict], path: Path) -> None:
    """Draws training and validation loss by step into a PNG; nothing where there are no rows."""
    if not rows:
        return
    import matplotlib  # takes as long to import as all the rest

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    with naming(path):
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
