"""The file that TensorBoard reads."""

import errno
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.run.tensorboard import TensorBoard


def events(path):
    """The events of a file: each a length of 8 bytes, a checksum of 4, the event, a checksum."""
    content = path.read_bytes()
    while content:
        [length] = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_rows_become_events(tmp_path):
    with TensorBoard(tmp_path / "events", 7) as board:
        board.write({"step": 8, "loss": 2.5, "rate": 1e-3})
        # What is written is on disk at once.
        [path] = (tmp_path / "events").iterdir()
        version, began, row = events(path)
    assert path.name.startswith("events.out.tfevents.")
    assert version.file_version == "brain.Event:2"
    assert (began.step, began.session_log.status) == (8, SessionLog.START)
    assert row.step == 8 and row.wall_time > 1e9
    values = {value.tag: value.simple_value for value in row.summary.value}
    np.testing.assert_allclose([values["loss"], values["rate"]], [2.5, 1e-3], rtol=1e-7)


def test_an_error_names_the_folder(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path / "events", 0)

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.flush", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/events'"):
        board.write({"step": 1, "loss": 1.0})
