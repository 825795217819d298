"""onnxruntime-genai's model builder, run as a process of its own."""

import collections
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from slm.config import Target
from slm.errors import StepError

log = logging.getLogger("slm.export")


def builder_arguments(target: Target) -> list[str]:
    """What the builder is told of a target."""
    options = [f"{key}={value}" for key, value in target.builder_options.items()]
    arguments = ["-p", target.precision.value, "-e", target.execution_provider.value]
    return [*arguments, "--extra_options", *options] if options else arguments


def build(checkpoint: Path, arguments: list[str], onnx: Path, cache: Path) -> tuple[float, float]:
    """Build an ONNX folder; return the seconds that it took, and the builder's peak memory in MB.

    Raises StepError if the builder does not know the architecture, fails, or is killed.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    layers = config.get("num_hidden_layers", 0)
    try:
        return run_builder(["-i", str(checkpoint), "-o", str(onnx), *arguments], layers, cache)
    except StepError as error:
        if "model is not currently supported" not in str(error):
            raise
        architecture = config["architectures"][0]
        raise StepError(f"the model builder does not support {architecture}.") from error


def run_builder(arguments: list[str], layers: int, cache: Path) -> tuple[float, float]:
    """Run the model builder to its end; return its seconds and its peak resident memory in MB.

    As a subprocess it gives its memory back on exit.
    """
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-c",
        str(cache),
        *arguments,
    ]
    log.info("%s", shlex.join(command))
    environment = {
        **os.environ,
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }
    last_lines: collections.deque[str] = collections.deque(maxlen=4)
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        with tqdm(total=2 * layers + 2, desc="export", unit="layer", leave=False) as bar:
            for line in process.stdout:
                if line[:1].strip():  # not the code in a traceback
                    last_lines.append(line.rstrip())
                if phase := re.match(
                    r"(Reading layer \d+|Reading embedding layer|Saving ONNX model)", line
                ):
                    if bar.disable and not re.match(r"Reading layer [1-9]", phase.group()):
                        log.info("%s", phase.group().lower())
                    bar.update()
                elif re.search(r"complete quantization of /model/layers\.\d+/\S*down_proj", line):
                    bar.update()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.terminate()
            process.wait()
    if process.returncode == -signal.SIGKILL:
        raise StepError(
            "the model builder was killed, most likely for lack of memory: it needs about three "
            "times the size of a bfloat16 checkpoint."
        )
    if process.returncode:
        text = " | ".join(last_lines) or "it printed nothing"
        raise StepError(f"the model builder failed, exit code {process.returncode}: {text}")
    return round(time.monotonic() - start, 1), round(usage.ru_maxrss / 1024 * 1.048576, 1)
