"""How a run is going: a bar on a terminal, plain lines elsewhere."""

import rich.progress
from rich.console import Console


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
        """Prints lines, above the bar where there is one."""
        self._console.print(text, markup=False)
