"""The cores that a process may use, and taking turns on them."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE_S = 15.0  # a large model takes as long for a piece of a prompt


def available_cores() -> int:
    """The cores that models of this process take: all that it may use, or fewer.

    OMP_NUM_THREADS caps them; Spark sets it to the cores of a task.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(all_cores(), int(limit))) if limit.isdigit() else all_cores()


def all_cores() -> int:
    """The cores that this process may use: its affinity, capped by the CPU quota of its cgroup."""
    return max(1, min(len(affinity()), cpu_quota() or 2**20))


def cpu_quota() -> int | None:
    """The whole cores that the cgroup (version 2) may use; None if they are not limited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return None


def affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Turn:
    """A turn on this process's cores: models that take all of them compute one at a time.

    Two models that compute at once on the same cores get a third less done than one alone, because
    their threads wait for threads that are not running. The models of one user share two locks, in
    all processes. A model that waits for its turn holds the second lock, so that no model has two
    turns while another waits. If a turn does not come within `PATIENCE_S` (its holder may be
    stopped), the model computes without it, and does not wait again for a minute.
    """

    def __init__(self, needed: bool = True) -> None:
        self.next: int | None = None
        self.turn: int | None = None
        self.waits_again_at = 0.0
        if fcntl is not None and needed:
            cores = hashlib.sha256(repr(affinity()).encode()).hexdigest()[:16]
            path = Path(tempfile.gettempdir()) / f"genai-{os.getuid()}-{cores}"
            with contextlib.suppress(OSError):
                self.next, self.turn = open_lock(f"{path}.next"), open_lock(f"{path}.turn")

    def close(self) -> None:
        """Forget the locks. A forked child has to, or it holds its parent's."""
        for file in (self.next, self.turn):
            if file is not None:
                os.close(file)
        self.next = self.turn = None

    __del__ = close

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.next is None or self.turn is None or time.monotonic() < self.waits_again_at:
            yield
            return
        until = time.monotonic() + PATIENCE_S
        taken = False
        if take(self.next, until):
            taken = take(self.turn, until)
            fcntl.flock(self.next, fcntl.LOCK_UN)
        if not taken:
            self.waits_again_at = time.monotonic() + 60
        try:
            yield
        finally:
            if taken and self.turn is not None:
                fcntl.flock(self.turn, fcntl.LOCK_UN)


def open_lock(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def take(lock: int, until: float) -> bool:
    """Take a lock, or give up at a time of time.monotonic."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.0001)
