"""The exporter's process: started, followed, and ended with this one."""

import collections
import json
import logging
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import mlflow
from tqdm import tqdm

from slm.config.common import ROOT
from slm.errors import KilledError, error_of
from slm.exporters.worker import MARK, Exported, Request
from slm.records import from_json
from slm.running.tracking import store_variables
from slm.running.work import enum_value
from slm.variables import variables

log = logging.getLogger("slm.export")
WORKER = "slm.exporters.worker"


def run_worker(request: Request) -> Exported:
    """Export in a process of its own.

    Raises a UserError for what it can name, KilledError if it was killed, RuntimeError with its
    last lines for anything else.
    """
    scratch = Path(request.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    told = scratch / "request.json"
    told.write_text(json.dumps(asdict(request), default=enum_value))
    command = [sys.executable, "-m", WORKER, str(told)]
    log.info("%s", " ".join(command))
    own = {"ORT_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    own["HF_HUB_OFFLINE"] = "1"
    if run := mlflow.active_run():
        own |= {**store_variables(), "MLFLOW_RUN_ID": run.info.run_id}  # what it runs are children
    # The column loops of gptq.py are of small products, which threads only slow down.
    own["OPENBLAS_NUM_THREADS"] = "1"
    # glibc keeps what is freed, for each thread: gigabytes where rows are rounded.
    own |= {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**22)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**variables(), **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        last_lines = follow(process)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if (scratch / "exported.json").is_file():
        return from_json(Exported, json.loads((scratch / "exported.json").read_text()))
    if (error := scratch / "error").is_file():
        raise error_of(error.read_text(), process.returncode)
    if process.returncode == -signal.SIGKILL:
        raise KilledError("the exporter")
    text = "\n".join(last_lines) or "it printed nothing"
    raise RuntimeError(f"the exporter failed, exit code {process.returncode}:\n{text}")


def follow(process: subprocess.Popen[str]) -> list[str]:
    """Show how far the process is until it ends; return the last lines that say something else."""
    last_lines: collections.deque[str] = collections.deque(maxlen=60)
    assert process.stdout is not None
    quarter = 0
    with tqdm(desc="export", unit="tensor", leave=False, disable=None) as bar:
        for line in process.stdout:
            if not line.startswith(MARK):
                last_lines.append(line.rstrip())
                continue
            done, total, name = json.loads(line.removeprefix(MARK))
            if not total:
                log.info("%s", name)
                continue
            bar.total, bar.n = total, done
            bar.set_postfix_str(name[-40:])
            if bar.disable and 4 * done // total > quarter:
                quarter = 4 * done // total
                log.info("%s of %s tensors written", done, total)
    return list(last_lines)
