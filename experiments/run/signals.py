"""A run is stopped by signals in good order."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Takes SIGTERM and SIGINT as a request to stop; a second SIGINT interrupts at once.

    Where several processes run as one, a signal to any of them stops all after the same step.

    A context manager: the signals mean what they meant before once it is left.
    """

    def __init__(self):
        self._requested = False

    def requested_after(self, step: int) -> bool:
        """Whether to stop after a step; to be asked once after each, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __enter__(self):
        # JAX itself takes SIGTERM where there are several processes.
        alone = jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        del number, frame
        self._requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
