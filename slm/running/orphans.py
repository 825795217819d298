"""No orphans: what works for a step ends with the step, also if that is killed."""

import ctypes
import signal
import sys

PARENT_DEATH_SIGNAL = 1  # of Linux's prctl(2)


def end_with_parent() -> None:
    """Have the kernel kill this process if the one that started it ends (Linux only).

    It would write into a folder that the next run makes anew, and take cores from what that
    measures.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
