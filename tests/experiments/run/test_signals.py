"""Signals stop a run in good order."""

import signal

import pytest

from experiments.run.signals import StopSignals


def test_the_first_signal_asks_and_a_second_interrupt_ends():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop.requested_after(1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested_after(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
