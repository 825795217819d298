"""What exporting takes: seconds and memory of int4 exports of random checkpoints, by size.

    python -m bench.export                      # 135M 1B 3.8B
    python -m bench.export 7B --quantizer builder
    python -m bench.export 1B --limit-mb 2500   # fails if it needs more than that

Writes each checkpoint (bfloat16), exports it, and removes both. Peaks are of the exporter's
process: resident, and anonymous (without the pages of mapped files), sampled ten times a second.
"""

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from slm.config import ExecutionProvider, Precision, Quantizer, Target
from slm.exporters import process
from slm.exporters.worker import Request
from slm.running.logs import set_up_logging

# The shapes of SmolLM2-135M, Llama-3.2-1B, Phi-3-mini and Mistral-7B, each with a head of its own.
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv": 3, "vocab": 49152},
    "1B": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128256},
    "3.8B": {"hidden": 3072, "inner": 8192, "layers": 32, "heads": 32, "kv": 32, "vocab": 32064},
    "7B": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 32768},
}


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> int:
    """Write a Llama of random bfloat16 weights, one file for each layer; return its parameters."""
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
        layer = re.search(r"\.(\d+)\.", name)
        shards.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", []).append(name)
    for shard, names in shards.items():
        tensors = {
            name: torch.empty(parameters[name].shape, dtype=torch.bfloat16).normal_(0, 0.02)
            for name in names
        }
        save_file(tensors, folder / shard, {"format": "pt"})
    of = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": of})
    )
    return sum(parameter.numel() for parameter in parameters.values())


class Peaks(threading.Thread):
    """Follows the children of this process: their highest resident and anonymous memory, in MB.

    Linux keeps them to `limit` bytes of private memory, if it is not 0.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(daemon=True)
        self.limit = limit
        self.resident = self.anonymous = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                try:
                    if self.limit:
                        child.rlimit(psutil.RLIMIT_DATA, (self.limit, self.limit))
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except (OSError, psutil.NoSuchProcess):
                    continue
                for name in ("resident", "anonymous"):
                    key = {"resident": "VmRSS", "anonymous": "RssAnon"}[name]
                    if found := re.search(rf"{key}:\s+(\d+) kB", status):
                        setattr(self, name, max(getattr(self, name), int(found[1]) * 1.024e-3))


def measure(name: str, quantizer: Quantizer, limit_mb: int, scratch: Path) -> str:
    """One row of the table."""
    checkpoint = scratch / "checkpoint"
    parameters = write_checkpoint(checkpoint, SHAPES[name])
    own = {"algo_config": "default", "block_size": 32, "accuracy_level": 4}
    cpu, int4 = ExecutionProvider.cpu, Precision.int4
    target = Target("cpu", cpu, int4, "", quantizer, builder_options=own)
    onnx, work = str(scratch / "onnx"), str(scratch / "work")
    request = Request(str(checkpoint), onnx, work, target, ["genai"], "some text " * 40, 8192)
    mapped = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    # safetensors maps files privately, which Linux counts though they take no memory.
    limit = limit_mb * 10**6 + mapped if limit_mb else 0
    peaks, start = Peaks(limit), time.monotonic()
    peaks.start()
    exported = process.run_worker(request)
    seconds = time.monotonic() - start
    peaks.ended.set()
    size = sum(path.stat().st_size for path in Path(onnx).iterdir()) / 1e6
    numbers = [seconds, exported.parity.seconds, peaks.resident, peaks.anonymous, size]
    row = [name, quantizer.value, f"{parameters / 1e9:.2f}", *(f"{n:.0f}" for n in numbers)]
    return f"| {' | '.join(row)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", default=["135M", "1B", "3.8B"], help="of SHAPES")
    parser.add_argument("--quantizer", type=Quantizer, default=Quantizer.rtn, choices=Quantizer)
    parser.add_argument("--limit-mb", type=int, default=0, help="of private memory (Linux)")
    parser.add_argument("--scratch", help="folder for the checkpoints: 3 bytes a parameter")
    arguments = parser.parse_args()
    set_up_logging()
    columns = ["shape", "quantizer", "10^9 weights", "s", "of it parity"]
    columns += ["resident MB", "anonymous MB", "MB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            print(measure(name, arguments.quantizer, arguments.limit_mb, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
