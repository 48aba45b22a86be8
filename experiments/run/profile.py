"""A trace of some steps, for xprof and TensorBoard."""

from contextlib import ExitStack
from pathlib import Path

import jax


class Profile:
    """Traces the steps START to STOP of a run into a folder; leave it, and the trace ends."""

    def __init__(self, steps: str | None, folder: Path):
        """Takes "START:STOP", or None for no trace.

        Raises:
          ValueError: the text is not two steps, the first of them 1 or more, in order.
        """
        self._folder, self._open = folder, ExitStack()
        self._start, self._stop = (0, 0) if steps is None else _read(steps)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._open.close()

    def before(self, step: int) -> None:
        """A step is about to be given to the devices."""
        if step == self._start:
            self._open.enter_context(jax.profiler.trace(self._folder))

    def after(self, step: int, values) -> None:
        """It was given to them; its results are `values`."""
        if step == self._stop:
            jax.block_until_ready(values)
            self._open.close()


def _read(steps):
    start, colon, stop = steps.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and 1 <= int(start) <= int(stop)):
        raise ValueError(
            f"profile={steps!r}; give the first and the last step to trace, as --profile=10:12."
        )
    return int(start), int(stop)
