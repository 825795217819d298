"""What a process takes up, and what there is for it."""

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


def peak_with_children_mb() -> float:
    """The largest peak of this program and of the processes that it started and that ended, in MB.

    Of a child, the system counts what it had before its program began too.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6
    return round(max(peak_rss_mb(), children), 1)


def available_memory_gb(system: Path = Path("/")) -> float:
    """Memory that a new process can have without swapping, in GB: the system's, or its cgroup's.

    `system` is where /proc and /sys lie.
    """
    return min([psutil.virtual_memory().available / 1e9, *left_in_cgroups(system)])


def left_in_cgroups(system: Path = Path("/")) -> list[float]:
    """What each limit above this process leaves, in GB, pages that can be read again included.

    Of cgroup version 2 and 1; a limit that is none says "max", or nearly 2^63.
    """
    left = []
    for line in lines_of(system / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = system / "sys/fs/cgroup", ("memory.max", "memory.current")
            cached = "inactive_file "
        elif "memory" in controllers.split(","):
            root = system / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = "total_inactive_file "
        else:
            continue
        own = root / path.lstrip("/")
        for folder in [own, *own.parents][: len(own.relative_to(root).parts) + 1]:
            limit, used = (" ".join(lines_of(folder / name)) for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
                stat = [n for n in lines_of(folder / "memory.stat") if n.startswith(cached)]
                again = int(stat[0].split()[1]) if stat else 0
                left.append(max(0, int(limit) - int(used) + again) / 1e9)
    return left


def lines_of(file: Path) -> list[str]:
    """The lines of a file; none where there is no such file."""
    return file.read_text().splitlines() if file.is_file() else []


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
