"""What a process takes up."""

import re
import resource
from pathlib import Path


def peak_rss_mb() -> float:
    """Peak resident memory of this program, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, begins anew with the program
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert peak is not None
        return int(peak.group(1)) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes
