"""A run as a process."""

import signal

import pytest

from experiments.run.process import StopSignals, exclusive


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(BlockingIOError, match="another process is training"),
        exclusive(tmp_path),
    ):
        pass
    with exclusive(tmp_path):
        pass


def test_the_first_signal_asks_and_a_second_interrupt_ends():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
