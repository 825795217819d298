"""The cores that a process may use, and taking turns on them."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def available_cores() -> int:
    """The cores that this process may use: its affinity, capped by the CPU quota of its cgroup.

    OMP_NUM_THREADS caps them further; Spark sets it to the cores of a task.
    """
    cores = len(affinity())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # cgroup v2
        cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit)) if limit.isdigit() else cores)


def affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Turn:
    """A turn on this process's cores: models that take all of them compute one at a time.

    Two that compute at once on the same cores, each with a thread for every core, get a third less
    done together than one does alone, because threads wait for others that are not running. Models
    of one user share a lock, in this process and others; none is taken where locks are not.
    """

    def __init__(self) -> None:
        self.file: int | None = None
        if fcntl is not None:
            cores = hashlib.sha256(repr(affinity()).encode()).hexdigest()[:16]
            path = Path(tempfile.gettempdir()) / f"genai-{os.getuid()}-{cores}.lock"
            with contextlib.suppress(OSError):
                self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def __del__(self) -> None:
        if self.file is not None:
            os.close(self.file)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.file is None:
            yield
            return
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)
