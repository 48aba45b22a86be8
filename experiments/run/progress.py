"""How a run is going: a line with a bar on a terminal, plain lines elsewhere."""

import re

import rich.progress
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # not tab and line feed
_SHORTEST_BAR = 10  # columns


class Progress:
    """Shows the step, the time left, the loss and tokens/s. A context manager."""

    def __init__(self, start: int, steps: int, console: Console | None = None):
        """Starts at step `start` of `steps`."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._steps = steps
        self._bar = rich.progress.Progress(
            _Line(self._console),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, status="")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def advance(self, step: int) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=step)

    def show(self, row: dict, seconds_left: float) -> None:
        """Shows a row of metrics."""
        status = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if self._console.is_terminal:
            self._bar.update(self._task, status=status)
        else:
            step = f"step {row['step']}/{self._steps}"
            self.say(f"{step}  {status}  {_clock(seconds_left)} left")

    def say(self, text: str) -> None:
        """Prints lines, above the bar where there is one; control characters as their escapes."""
        escaped = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
        self._console.print(escaped, markup=False)


class _Line(rich.progress.ProgressColumn):
    """The step and the time left, and whatever else a narrow terminal has room for."""

    def __init__(self, console):
        super().__init__()
        self._console = console

    def render(self, task):
        left = "" if task.time_remaining is None else f"  {_clock(task.time_remaining)} left"
        text = f"step {task.completed}/{task.total}{left}"
        for more in task.fields["status"].split("  "):
            if len(f"{text}  {more}") < self._console.width:
                text = f"{text}  {more}"
        line = Table.grid(padding=(0, 2))
        room = self._console.width - len(text) - 3
        bar = ProgressBar(total=task.total, completed=task.completed, width=room)
        line.add_row(Text(text, no_wrap=True), *([bar] if room >= _SHORTEST_BAR else []))
        return line


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
