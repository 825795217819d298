"""Export a checkpoint to ONNX for one hardware target, with onnxruntime-genai's builder.

    python -m steps.export_onnx target=cpu-int4-rtn-block-32-acc-level-4 source=/data/checkpoint

An export counts only once its tokenizer agrees with the checkpoint's, and it has loaded and
generated.
"""

import collections
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flavors.genai.decoder import ExecutionProviderUnavailable
from flavors.genai.parameters import Parameters
from flavors.genai.runtime import Runtime
from steps.command import entry_point
from steps.config import ROOT, Config, Target
from steps.provenance import read_provenance, require_files, size_mb, write_provenance
from steps.step import local_path, run_step, versions

log = logging.getLogger("steps.export_onnx")

LIBRARIES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")
# What the runtime's tokenizer has to encode as the checkpoint's does: spaces, digits, code,
# accents, CJK, emoji.
PROBES = (
    "Hello, world!  It's 12:30.",
    "def f(x):\n\treturn x ** 2\n",
    "Émile naïve, für 3,50 €",
    "山脚下的小镇",
    "👍🏽 ok 😀",
)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX folder; `checked_on` is the execution provider that it generated on, or "none".

    `tokenizer_differences` counts the probe texts that it encodes otherwise than the checkpoint.
    """

    uri: str
    target: str
    checked_on: str
    tokenizer_differences: int
    size_mb: float
    build_s: float
    peak_rss_mb: float
    builder_arguments: list[str]
    versions: dict[str, str]
    files: dict[str, str]


def export_onnx(
    checkpoint: Path, provenance: dict[str, Any], target: Target, folder: Path
) -> OnnxModel:
    """Run the builder, check what it wrote, and record how it was made."""
    onnx = folder / "onnx"
    options = [f"{key}={value}" for key, value in target.builder_options.items()]
    arguments = ["-p", target.precision.value, "-e", target.execution_provider.value]
    arguments += ["--extra_options", *options] if options else []
    config = json.loads((checkpoint / "config.json").read_text())
    layers = config.get("num_hidden_layers", 0)
    try:
        build_s, peak_rss_mb = run_builder(
            ["-i", str(checkpoint), "-o", str(onnx), *arguments], layers, folder / "cache"
        )
    except RuntimeError as error:
        if "model is not currently supported" not in str(error):
            raise
        architecture = config["architectures"][0]
        raise RuntimeError(f"the model builder does not support {architecture}.") from error
    require_files(
        onnx, "genai_config.json", "tokenizer.json", "tokenizer_config.json", made_by="export_onnx"
    )
    checked_on, differences = require_it_generates(onnx, checkpoint, target)
    onnx_provenance = write_provenance(
        onnx,
        checkpoint=provenance,
        target=target.name,
        checked_on=checked_on,
        builder_arguments=arguments,
        versions=versions(*LIBRARIES),
    )
    return OnnxModel(
        uri=str(onnx),
        target=target.name,
        checked_on=checked_on,
        tokenizer_differences=differences,
        size_mb=size_mb(onnx),
        build_s=build_s,
        peak_rss_mb=peak_rss_mb,
        builder_arguments=arguments,
        versions=onnx_provenance["versions"],
        files=onnx_provenance["files"],
    )


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
    log.info("export_onnx: %s", " ".join(command[1:]))
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
                        log.info("export_onnx: %s", phase.group().lower())
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
        raise RuntimeError(
            "the model builder was killed, most likely for lack of memory: it needs about three "
            "times the size of a bfloat16 checkpoint."
        )
    if process.returncode:
        text = " | ".join(last_lines) or "it printed nothing"
        raise RuntimeError(f"the model builder failed, exit code {process.returncode}: {text}")
    return round(time.monotonic() - start, 1), round(usage.ru_maxrss / 1024 * 1.048576, 1)


def require_it_generates(onnx: Path, checkpoint: Path, target: Target) -> tuple[str, int]:
    """Raise unless the model loads, tokenizes as its checkpoint and generates.

    Returns the provider that it did so on, and the tokenizer's differences. Where the target's own
    provider is absent, the CPU stands in if it can; else the provider is "none".
    """
    provider = target.execution_provider.value
    try:
        runtime = Runtime(onnx, provider)
    except ExecutionProviderUnavailable as absent:
        log.info("export_onnx: %s; checking on the CPU", absent)
        try:
            runtime, provider = Runtime(onnx, "cpu"), "cpu"
        except RuntimeError as error:
            log.info(
                "export_onnx: not checked, the CPU cannot run it: %s",
                " ".join(str(error).split())[:300],
            )
            return "none", 0
    differences = require_same_tokens(runtime, checkpoint)
    prompt = runtime.render([{"role": "user", "content": "Hello"}])
    [[answer]] = runtime.answer([prompt], Parameters(max_tokens=8))
    if answer.completion_tokens == 0:
        raise RuntimeError(f"{onnx} loads but generates nothing: the export is broken.")
    if not np.isfinite(runtime.log_probabilities(runtime.tokenizer.encode("Hello, world!"))).all():
        raise RuntimeError(f"{onnx} loads but its logits are not finite: the export is broken.")
    return provider, differences


def require_same_tokens(runtime: Runtime, checkpoint: Path) -> int:
    """Raise where the runtime renders or encodes a chat otherwise than the checkpoint.

    Returns how many of the other probes encode differently: rare characters that few prompts hold.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    messages += [{"role": "user", "content": "Who are you?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if runtime.render(messages) != rendered:
        raise RuntimeError(
            f"the chat template renders as {runtime.render(messages)!r}; "
            f"the checkpoint's as {rendered!r}."
        )
    differences = 0
    for text in (rendered, *PROBES):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = [int(token) for token in runtime.tokenizer.tokenizer.encode(text)]
        if found in (expected, [tokenizer.bos_token_id, *expected]):
            continue
        message = f"the exported tokenizer encodes {text!r} as {found[:8]}…, "
        message += f"the checkpoint's as {expected[:8]}…"
        if text == rendered or -1 in found:
            raise RuntimeError(
                f"{message}: onnxruntime-genai does not support this tokenizer.json."
            )
        log.warning("export_onnx: %s", message)
        differences += 1
    return differences


def main(config: Config) -> OnnxModel:
    checkpoint = local_path(config.source, "source", "fetch")
    require_files(checkpoint, "config.json", made_by="fetch")
    provenance = read_provenance(checkpoint)
    return run_step(
        "export_onnx",
        config,
        OnnxModel,
        key={
            "checkpoint": provenance,
            "target": asdict(config.target),
            "versions": versions(*LIBRARIES),
        },
        code=[Path(__file__), ROOT / "flavors"],
        work=lambda folder: export_onnx(checkpoint, provenance, config.target, folder),
    )


if __name__ == "__main__":
    entry_point(main)
