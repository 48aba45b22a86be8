"""A run as a process: the only one in its directory."""

import contextlib
import ctypes
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_memory() -> None:
    """Has the C library keep memory that is freed, instead of giving it back to the system.

    XLA on a CPU allocates anew for each call. Pages that are new cost more than what is computed in
    them: twice an array of 51 MB takes 17 ms in new memory, and 2.4 ms in memory used before.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in a directory until the body, or this process, ends.

    Raises:
      BlockingIOError: another process is training there.
    """
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is training in {workdir}.") from None
        yield
