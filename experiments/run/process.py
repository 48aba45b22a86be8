"""A run as a process: the only one in its directory."""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_memory(one_heap: bool) -> None:
    """Has the C library keep memory that is freed, instead of giving it back to the system.

    XLA on a CPU allocates anew for each call. Pages that are new cost more than what is computed in
    them: twice an array of 51 MB takes 17 ms in new memory, and 2.4 ms in memory used before.

    Args:
      one_heap: whether all threads share a heap, in pages of 2 MB. In heaps of other threads blocks
        above 64 MB are new each time, and small pages are read more slowly; but large ones take
        longer to get where a virtual machine has to ask its host for them.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # not glibc
        return
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)
    if one_heap:
        library.mallopt(_M_ARENA_MAX, 1)
        _make_pages_large(library)


def _make_pages_large(library):
    """Has half of the machine's memory in pages of 2 MB, where and when the heap grows into it.

    So many addresses are taken, once, and given back to the heap, which keeps what it is told of
    them here.
    """
    page = mmap.PAGESIZE
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    library.malloc.restype = ctypes.c_void_p
    room = library.malloc(ctypes.c_size_t(size))
    if room is None:
        return
    begin = -(-room // page) * page
    end = (room + size) // page * page
    library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    library.free(ctypes.c_void_p(room))


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
