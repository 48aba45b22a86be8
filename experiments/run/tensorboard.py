"""Numbers by step in a file that TensorBoard reads."""

import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from transformer.files import naming


class TensorBoard:
    """A new file of events in a folder. A context manager, which closes it.

    tensorboardX's own `SummaryWriter` writes in a thread, whose errors nobody can catch. This one
    writes, and fails, where it is told to.
    """

    def __init__(self, folder: Path, step: int):
        """Goes on after a step: TensorBoard no longer shows what came later."""
        self._folder = folder
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{step}")
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with naming(self._folder):
            self._events.close()

    def write(self, row: dict) -> None:
        """Adds a row: `step` and numbers."""
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        self._write(Event(step=row["step"], summary=Summary(value=values)))

    def _write(self, event):
        event.wall_time = time.time()
        with naming(self._folder):
            self._events.write_event(event)
            self._events.flush()
