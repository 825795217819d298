"""What a process takes up."""

import contextlib
import ctypes
import re
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

PAGE_OUT = 21  # of Linux's madvise(2): pages that can be read again are dropped, none is lost


def peak_rss_mb() -> float:
    """Peak resident memory of this program, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, begins anew with the program
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert peak is not None
        return int(peak.group(1)) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def rss_mb() -> float:
    """Resident memory of this process, in MB (10^6 bytes)."""
    return psutil.Process().memory_info().rss / 1e6


def available_mb() -> float:
    """What this process may still take up, in MB: the machine's, and its cgroup's (version 2)."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = re.search(
            r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE
        )
        free = min(free, limit - used + int(files.group(1) if files else 0))
    return free / 1e6


def peak_with_children_mb() -> float:
    """The largest peak of this program and of the processes that it started and that ended, in MB.

    Of a child, the system counts what it had before its program began too.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6
    return round(max(peak_rss_mb(), children), 1)


@contextlib.contextmanager
def releasing_mapped(folder: Path) -> Iterator[None]:
    """Meanwhile, give back the memory of what was read out of a folder's mapped weights (Linux)."""
    ended = threading.Event()

    def release() -> None:
        while not ended.wait(0.2):
            release_mapped(folder.resolve())

    thread = threading.Thread(target=release, daemon=True)
    if sys.platform == "linux":
        thread.start()
    try:
        yield
    finally:
        ended.set()


def release_mapped(folder: Path) -> None:
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f" {folder}/" in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), PAGE_OUT)
