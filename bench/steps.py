"""What the steps of a run take: seconds, memory and disk, on a random checkpoint of some shape.

    python -m bench.steps 3.8B --scratch /tmp/steps

Runs fetch (from a folder), export_onnx, log_pyfunc and log_transformers, each as its users start
it, with a work folder and artifacts on one file system. Memory is the highest of any one process,
resident and anonymous. Disk is what a step leaves, and what it had for a while besides.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlflow

from bench.export import SHAPES, Peaks, write_checkpoint
from slm.config.common import ROOT

STEPS = ("fetch", "export_onnx", "log_pyfunc", "log_transformers")


class Disk(threading.Thread):
    """Follows what a folder takes on the disk, in GB: each file once, however many names it has."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most_gb, self.ended = folder, 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(1):
            self.most_gb = max(self.most_gb, self.gb())

    def gb(self) -> float:
        listed = subprocess.run(["du", "-s", "-B1", self.folder], capture_output=True, text=True)
        return int(listed.stdout.split()[0]) / 1e9


def measure(step: str, overrides: list[str], scratch: Path) -> tuple[str, str]:
    """A row of the table, and the URI of what the step made."""
    own = {"SLM_WORK": str(scratch / "work"), "MLFLOW_EXPERIMENT_NAME": "bench"}
    own |= {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch / 'mlflow.db'}"}
    peaks, disk = Peaks(0, scratch / "none", 0), Disk(scratch)
    before_gb, started = disk.gb(), time.monotonic()
    cpu_before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    peaks.start()
    disk.start()
    command = [sys.executable, "-m", f"steps.{step}", *overrides]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, check=True)
    seconds = time.monotonic() - started
    for thread in (peaks, disk):
        thread.ended.set()
    left_gb = disk.gb()
    cpu_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu_before
    numbers = [f"{n:.0f}" for n in (seconds, cpu_s, peaks.resident, peaks.anonymous)]
    numbers += [f"{left_gb - before_gb:.1f}", f"{max(disk.most_gb - left_gb, 0):.1f}"]
    [made] = (scratch / "work" / step).glob("*/result.json")
    outcome = json.loads(made.read_text())["outcome"]
    return f"| {' | '.join([step, *numbers])} |", outcome.get("uri", "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--scratch", type=Path, help="a folder for all of it, removed at the end")
    parser.add_argument("--checkpoint", type=Path, help="one that bench.export --scratch left")
    parser.add_argument("--overrides", nargs="*", default=[], help="of every step: target=…")
    arguments = parser.parse_args()
    if arguments.scratch:
        arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch, own = Path(folder), arguments.checkpoint or Path(folder) / "own"
        if not arguments.checkpoint:
            write_checkpoint(own, SHAPES[arguments.shape])
        client = mlflow.MlflowClient(f"sqlite:///{scratch / 'mlflow.db'}")
        client.create_experiment("bench", artifact_location=(scratch / "mlruns").as_uri())
        columns = ["step", "s", "CPU s", "resident MB", "anonymous MB", "kept GB", "temporary GB"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
        model = ["model.name=random", f"model.source={own.resolve()}", *arguments.overrides]
        made = {"": ""}
        for step in STEPS:
            of = {"log_pyfunc": "export_onnx", "fetch": ""}.get(step, "fetch")
            source = [f"source={made[of]}"] if of else []
            row, made[step] = measure(step, [*model, *source], scratch)
            print(row, flush=True)


if __name__ == "__main__":
    main()
