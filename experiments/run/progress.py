"""How a run is going: a bar on a terminal, plain lines elsewhere."""

import re

import rich.progress
from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # not tab and line feed


class Progress:
    """Shows the step, the loss, tokens/s and the time left. A context manager."""

    def __init__(self, start: int, steps: int):
        """Starts at step `start` of `steps`."""
        self._console = Console(highlight=False, soft_wrap=True)
        self._steps = steps
        self._bar = rich.progress.Progress(
            "step {task.completed}/{task.total}",
            rich.progress.BarColumn(),
            "{task.fields[status]}",
            rich.progress.TimeRemainingColumn(),
            "left",
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
            minutes, seconds = divmod(round(seconds_left), 60)
            self.say(f"step {row['step']}/{self._steps}  {status}  {minutes}:{seconds:02} left")

    def say(self, text: str) -> None:
        """Prints lines, above the bar where there is one; control characters as their escapes."""
        escaped = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
        self._console.print(escaped, markup=False)
