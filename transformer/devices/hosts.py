"""Several processes that run as one, each with its own devices: on JAX's own runtime."""

import hashlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

# How long the processes do without a sign of life from one of them before JAX ends them.
HEARTBEAT_SECONDS = 30


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; call it before anything else of JAX.

    Args:
      coordinator_address: HOST:PORT of process 0, which must be free there; None: JAX reads all
        three from the environment that Slurm, Open MPI, Kubernetes and Cloud TPU give.
      num_processes: how many processes there are.
      process_id: which of them this one is, from 0 on.

    Raises:
      ValueError: the environment does not say what was not given, or only some of it was.
      RuntimeError: the others did not come in time.
    """
    given = (coordinator_address, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(
            f"{coordinator_address=}, {num_processes=}, {process_id=}; give all three, or none of "
            "them where a cluster's environment says them."
        )
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if any(x is not None for x in given):
            raise
        raise ValueError(
            "JAX finds no Slurm, Open MPI, Kubernetes or Cloud TPU here; give coordinator_address, "
            f"num_processes and process_id. ({error})"
        ) from error


@contextmanager
def failing_at_once() -> Iterator[None]:
    """Where the body fails on one of several processes, that process ends at once.

    Left to itself it would wait for the others, which wait for it. They end in turn, when they miss
    it in what they do together, or JAX ends them after HEARTBEAT_SECONDS.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} can reach another "
                "one no longer, which has ended or was killed; the same command on all of them "
                f"goes on from the last checkpoint. ({str(error).partition(chr(10))[0][:200]})",
                file=sys.stderr,
            )
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def is_main() -> bool:
    """Whether this is the process that writes what people read."""
    return jax.process_index() == 0


def wait(why: str) -> None:
    """Returns once every process has called this; `why` is the same text on all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def require_same(what: str, value) -> None:
    """Refuses processes that would not do the same, and would wait for each other; all call it.

    Args:
      what: names the value to a reader.
      value: anything whose `repr` says it all.

    Raises:
      ValueError: the value is not that of process 0 everywhere.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    if others := [n for n, other in enumerate(digests) if (other != digests[0]).any()]:
        raise ValueError(
            f"{what} is not the same on all processes: process 0 has another than "
            f"{', '.join(map(str, others))}."
        )


def gather(tree):
    """The whole arrays of a tree, as NumPy's, on every process, each of which must call it."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)
