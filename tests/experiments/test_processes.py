"""Two processes of four devices, with a coordinator of their own, train as one."""

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


def by_flags(address, n):
    """Process n of two as people start it by hand: its flags, and its environment."""
    return (f"--coordinator_address={address}", "--num_processes=2", f"--process_id={n}"), {}


def by_slurm(address, n):
    """As `srun -n 2` starts it, on a port that JAX would otherwise make of the job's number."""
    host, port = address.split(":")
    task = {"JOB_ID": 7, "STEP_NODELIST": host, "NTASKS": 2, "PROCID": n, "LOCALID": n}
    environment = {f"SLURM_{name}": str(value) for name, value in task.items()}
    return ("--distributed",), environment | {"JAX_COORDINATOR_PORT": port}


def by_open_mpi(address, n):
    """As `mpirun -n 2` starts it."""
    host, port = address.split(":")
    task = {"SIZE": 2, "RANK": n, "LOCAL_RANK": n}
    environment = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in task.items()}
    uri = {"OMPI_MCA_orte_hnp_uri": f"1531576320.0;tcp://{host}:{port}"}
    return ("--distributed",), environment | uri | {"JAX_COORDINATOR_PORT": port}


@pytest.fixture
def together(start, address, tmp_path):
    """A function that starts both processes of one command; they are killed where a test fails."""
    started = []

    def together(by, mesh):
        for n in range(2):
            flags, environment = by(address, n)
            flags = (f"--config.devices.mesh={mesh}", *flags)
            started.append(start(tmp_path / "run", *flags, devices=4, environment=environment))
        return started[-2:]

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


def stopped(one, other, workdir, step):
    """Stops both, after the same step, by a signal to one of them at some step: after which."""
    wait_for(workdir, step, (one, other))
    other.send_signal(signal.SIGTERM)
    (out, err), _ = one.communicate(timeout=PATIENCE), other.communicate(timeout=PATIENCE)
    assert (one.returncode, other.returncode) == (0, 0), err
    last = read_rows(workdir / METRICS_FILE)[-1]["step"]
    assert f"stopped after step {last}; the same command goes on" in out
    return last


def assert_same(workdir, reference, last):
    """The losses up to a step are those of a run on one device, and the model can be loaded."""
    losses = lambda path: [row["loss"] for row in read_rows(path / METRICS_FILE) if "loss" in row]
    # Gradients are summed over the devices in another order: float32 rounding, grown over steps
    # whose updates Adam divides by small numbers.
    np.testing.assert_allclose(losses(workdir)[:last], losses(reference)[:last], rtol=1e-3)
    load(workdir)


def test_one_that_is_killed_and_one_that_is_stopped(
    together, reference, start, signal_after, tmp_path
):
    workdir, mesh = tmp_path / "run", "data=2,fsdp=2,tensor=2"
    one, other = together(by_flags, mesh)
    wait_for(workdir, 25, (one, other))
    other.kill()
    _, err = one.communicate(timeout=PATIENCE)
    assert one.returncode != 0
    # What it was doing together with the other one failed, or JAX's coordinator was the first to
    # notice.
    assert "can reach another one no longer" in err or "another task died" in err

    last = stopped(*together(by_slurm, mesh), workdir, 30)  # goes on from step 20
    alone = start(workdir, "--config.devices.mesh=data=1")  # another mesh, and one process
    _, err, last = signal_after(alone, workdir, last + 10)
    assert alone.returncode == 0, err
    assert_same(workdir, reference, last)


@pytest.mark.thorough
def test_processes_that_were_not_started_alike(together, tmp_path):
    def by(address, n, *flags):
        given, environment = by_flags(address, n)
        return (*given, *flags), environment

    for process in together(lambda address, n: by(address, n, f"--config.data.seed={n}"), "data=8"):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "error: the config is not the same on all processes: process 0 has" in err
    folder = lambda address, n: by(address, n, f"--workdir={tmp_path / str(n)}")
    first, other = together(folder, "data=8")
    _, err = other.communicate(timeout=PATIENCE)
    assert "experiment.json: the first process wrote it, and this one does not see it" in err
    first.communicate(timeout=PATIENCE)
    assert first.returncode != 0


@pytest.mark.thorough
def test_from_one_process_to_two_and_back(together, reference, start, signal_after, tmp_path):
    workdir = tmp_path / "run"
    _, err, last = signal_after(start(workdir, devices=8), workdir, 10)
    assert last < 160, err
    # Each process has a part of the tokens of all rows, and two key heads lie on four devices.
    last = stopped(*together(by_open_mpi, "context=2,tensor=4"), workdir, last + 20)
    out, err = start(workdir, "--config.devices.mesh=tensor=4", devices=4).communicate()
    assert "finished after step 160" in out, err
    assert_same(workdir, reference, 160)
