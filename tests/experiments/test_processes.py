"""Two processes of two devices, with a coordinator of their own, train as one."""

import signal
import socket
import time

import numpy as np
import pytest

from experiments.run.metrics import METRICS_FILE, read_rows
from transformer import load

PATIENCE = 300  # seconds in which a process that lost another one has ended, on a busy machine


@pytest.fixture
def address():
    """Where process 0 listens: a port that nobody else is given while the test runs.

    It is taken here, in a way that lets one who asks for it by number, as gRPC does, have it too.
    """
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        yield "{}:{}".format(*taken.getsockname())


@pytest.fixture
def together(start, address, tmp_path):
    """A function that starts both processes of one command; they are killed where a test fails."""
    started = []

    def together(*flags):
        flags = (f"--coordinator_address={address}", "--num_processes=2", *flags)
        processes = [
            start(tmp_path / "run", f"--process_id={n}", *flags, devices=2) for n in range(2)
        ]
        started.extend(processes)
        return processes

    yield together
    for process in started:
        process.kill()
        process.communicate()


def wait_for(workdir, step, processes):
    """Returns once the metrics have a step."""
    path = workdir / METRICS_FILE
    while not (path.exists() and path.read_bytes().count(b"\n") >= step):
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_one_that_is_killed_and_one_that_is_stopped(
    together, reference, start, signal_after, tmp_path
):
    workdir = tmp_path / "run"
    mesh = "--config.devices.mesh=fsdp=2,tensor=2"
    one, other = together(mesh)
    wait_for(workdir, 25, (one, other))
    other.kill()
    _, err = one.communicate(timeout=PATIENCE)
    assert one.returncode != 0
    # What it was doing together with the other one failed, or JAX's coordinator was the first to
    # notice.
    assert "can reach another one no longer" in err or "another task died" in err

    one, other = together(mesh)  # goes on from step 20
    wait_for(workdir, 30, (one, other))
    other.send_signal(signal.SIGTERM)
    (out, err), _ = one.communicate(timeout=PATIENCE), other.communicate(timeout=PATIENCE)
    assert (one.returncode, other.returncode) == (0, 0), err
    stopped = read_rows(workdir / METRICS_FILE)[-1]["step"]
    assert f"stopped after step {stopped}; the same command goes on" in out

    alone = start(workdir, "--config.devices.mesh=data=1")  # another mesh, and one process
    _, err, last = signal_after(alone, workdir, stopped + 10)
    assert alone.returncode == 0, err
    losses = lambda path: [row["loss"] for row in read_rows(path / METRICS_FILE) if "loss" in row]
    # Gradients are summed over the devices in another order: float32 rounding, grown over steps
    # whose updates Adam divides by small numbers.
    np.testing.assert_allclose(losses(workdir)[:last], losses(reference)[:last], rtol=1e-3)
    load(workdir)
