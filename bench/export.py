"""What exporting takes: seconds and memory of int4 exports of random checkpoints, by size.

    python -m bench.export                      # 135M 1B 3.8B
    python -m bench.export 7B --quantizer builder
    python -m bench.export 1B --limit-mb 2500   # fails if it needs more than that
    python -m bench.export 3.8B --quantizer gptq --scratch /tmp/calibration --layers 2
    python -m bench.export 3.8B --quantizer gptq --depth 2 --budget-bits 6.3

Writes each checkpoint (bfloat16), exports it, and removes both. Peaks are of the exporter's
process: resident, and anonymous (without the pages of mapped files), sampled ten times a second.

A quantizer that calibrates reads the text that ships. With `--layers` its process is killed as soon
as that many more layers are calibrated, and a line for each tells what it took. `--scratch` keeps
what was made, so that the same command goes on after the last whole layer. `--depth` writes a
checkpoint of fewer layers, as wide as ever, whose head and budget are reached within minutes.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from slm.config.common import CONF
from slm.config.target import ExecutionProvider, Precision, Quantizer, Target
from slm.errors import KilledError, StepError
from slm.exporters import process
from slm.exporters.calibration_text import read_calibration
from slm.exporters.worker import Request
from slm.running.logs import set_up_logging
from slm.sources.verify import INDEX
from slm.sources.weights import layer_of

# The shapes of SmolLM2-135M, Llama-3.2-1B, Phi-3-mini and Mistral-7B, each with a head of its own.
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv": 3, "vocab": 49152},
    "1B": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128256},
    "3.8B": {"hidden": 3072, "inner": 8192, "layers": 32, "heads": 32, "kv": 32, "vocab": 32064},
    "7B": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 32768},
}

EXPORT = OmegaConf.load(CONF / "export" / "default.yaml")


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Llama of random bfloat16 weights, one file for each layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.checkpoints import write_tokenizer

    write_tokenizer(folder)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    shards: dict[str, list[str]] = {}
    for name in parameters:
        shards.setdefault(f"model-{layer_of(name) or 'rest'}.safetensors", []).append(name)
    for shard, names in shards.items():
        tensors = {
            name: torch.empty(parameters[name].shape, dtype=torch.bfloat16).normal_(0, 0.02)
            for name in names
        }
        save_file(tensors, folder / shard, {"format": "pt"})
    of = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of}))


class Peaks(threading.Thread):
    """Follows the children of this process: their highest resident and anonymous memory, in MB.

    Linux keeps them to `limit` bytes of private memory, if it is not 0. Each file that appears in
    `calibrated` is a lap, with what it took; after `layers` of them the children are killed.
    """

    def __init__(self, limit: int, calibrated: Path, layers: int) -> None:
        super().__init__(daemon=True)
        self.limit, self.calibrated, self.layers = limit, calibrated, layers
        self.resident = self.anonymous = 0.0
        self.laps: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        known, since, cpu_since = self.files(), time.monotonic(), 0.0
        resident = anonymous = 0.0
        while not self.ended.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                try:
                    if self.limit:
                        child.rlimit(psutil.RLIMIT_DATA, (self.limit, self.limit))
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    cpu_s = sum(child.cpu_times()[:2])
                except (OSError, psutil.NoSuchProcess):
                    continue
                resident = max(resident, mb_of(status, "VmRSS"))
                anonymous = max(anonymous, mb_of(status, "RssAnon"))
                self.resident = max(self.resident, resident)
                self.anonymous = max(self.anonymous, anonymous)
                for new in sorted(self.files() - known):
                    took = [time.monotonic() - since, cpu_s - cpu_since, resident, anonymous]
                    self.laps.append(f"| {new} | {' | '.join(f'{n:.0f}' for n in took)} |")
                    print(self.laps[-1], flush=True)
                    known, since, cpu_since = known | {new}, time.monotonic(), cpu_s
                    resident = anonymous = 0.0
                if self.layers and len(self.laps) >= self.layers:
                    child.kill()

    def files(self) -> set[str]:
        return {path.name for path in self.calibrated.glob("*.safetensors")}


def mb_of(status: str, key: str) -> float:
    """A line of /proc/<pid>/status, in 10^6 bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    return int(found[1]) * 1.024e-3 if found else 0.0


def measure(name: str, asked: argparse.Namespace, scratch: Path) -> str:
    """One row of the table; "" if it was ended after some layers."""
    checkpoint, calibrated = scratch / "checkpoint", scratch / "calibrated"
    if not (checkpoint / INDEX).is_file():
        shape = SHAPES[name]
        write_checkpoint(checkpoint, shape | {"layers": asked.depth or shape["layers"]})
    calibrated.mkdir(exist_ok=True)
    for left in ("onnx", "work"):  # of a process that was killed
        shutil.rmtree(scratch / left, ignore_errors=True)
    own = {"algo_config": "default", "block_size": 32, "accuracy_level": 4}
    cpu, int4, quantizer = ExecutionProvider.cpu, Precision.int4, asked.quantizer
    target = Target("cpu", cpu, int4, "", quantizer=quantizer, builder_options=own)
    onnx, work = str(scratch / "onnx"), str(scratch / "work")
    request = Request(
        checkpoint=str(checkpoint),
        onnx=onnx,
        scratch=work,
        target=dataclasses.replace(target, budget_bits=asked.budget_bits),
        makers=["genai"],
        text="some text " * 40,
        parity_tokens=EXPORT.parity_tokens,
        calibration=read_calibration(EXPORT.calibration) if quantizer.calibrates else [],
        calibration_tokens=EXPORT.calibration_tokens,
        calibrated=str(calibrated),
        shared=str(scratch / "model.shared"),
    )
    mapped = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    # safetensors maps files privately, which Linux counts though they take no memory.
    limit = asked.limit_mb * 10**6 + mapped if asked.limit_mb else 0
    peaks, start = Peaks(limit, calibrated, asked.layers), time.monotonic()
    peaks.start()
    try:
        exported = process.run_worker(request)
    except (StepError, KilledError):
        if not asked.layers or len(peaks.laps) < asked.layers:
            raise
        return ""
    finally:
        peaks.ended.set()
    seconds = time.monotonic() - start
    size = sum(path.stat().st_size for path in Path(onnx).iterdir()) / 1e6
    numbers = [seconds, exported.parity.seconds, peaks.resident, peaks.anonymous, size]
    parameters = mapped / 2e9
    row = [name, quantizer.value, f"{parameters:.2f}", *(f"{n:.0f}" for n in numbers)]
    return f"| {' | '.join(row)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=["135M", "1B", "3.8B"], help="of SHAPES")
    parser.add_argument("--quantizer", type=Quantizer, default=Quantizer.rtn, choices=Quantizer)
    parser.add_argument("--limit-mb", type=int, default=0, help="of private memory (Linux)")
    parser.add_argument("--layers", type=int, default=0, help="to calibrate before it is killed")
    parser.add_argument("--depth", type=int, default=0, help="layers of the checkpoint, if fewer")
    parser.add_argument("--budget-bits", type=float, help="a weight, of calibrated int4 and int8")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints stay, 3 bytes a weight")
    arguments = parser.parse_args()
    set_up_logging()
    if arguments.layers:
        print(
            "| file | s | CPU s | resident MB | anonymous MB |\n|---|---|---|---|---|", flush=True
        )
    else:
        columns = ["shape", "quantizer", "10^9 weights", "s", "of it parity"]
        columns += ["resident MB", "anonymous MB", "MB"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in arguments.shapes:
        with contextlib.ExitStack() as stack:
            if arguments.scratch is None:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                made = (name, arguments.quantizer.value, arguments.depth, arguments.budget_bits)
                scratch = arguments.scratch / "-".join(str(each) for each in made if each)
                scratch.mkdir(parents=True, exist_ok=True)
            print(measure(name, arguments, scratch), flush=True)


if __name__ == "__main__":
    main()
