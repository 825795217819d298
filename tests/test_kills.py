"""Real processes that are killed anywhere, or that work at once (tests/kills.py)."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from slm.config.common import ROOT
from slm.running.chain import PIPELINE


def test_a_step_that_was_killed_anywhere_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """`make test-kills` kills at more points, and leaves nothing out."""
    points = int(os.environ.get("SLM_KILLS", 0))
    command = [sys.executable, "-m", "tests.kills", str(tmp_path), str(points or 4)]
    command += ["--real"] if points else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads of many processes only spin
    process = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr[-3000:]
    two, *told = map(json.loads, process.stdout.splitlines())
    assert two == {
        "ended": [0, 0],
        "running": [],
        "made": [1] * len(PIPELINE),
        "models": 2,
        "versions": [1, 1],
        "waited": True,
    }
    assert len(told) == len(PIPELINE) * (2 * points or 4)
    for point in told:
        assert point["killed"] == -signal.SIGKILL or "after_s" in point, point
        assert (point["again"], point["differs"]) == (0, {}), point
