"""Measure checkpoint, candidate and champion in turn, or read what was measured of them before."""

import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.config import ROOT, Evaluate
from steps.evaluation.measure import Measured
from steps.provenance import digest_files, digest_of
from steps.step import one_line, versions

log = logging.getLogger("steps.evaluate")

LIBRARIES = ("mlflow", "onnxruntime-genai", "onnxruntime", "transformers", "torch")
# A process that ends so died of what the model made it do; otherwise something else was wrong.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True)
class Inputs:
    """What is measured: logged models, the champion that they stand against, texts and prompts.

    `candidates` are the interfaces of one ONNX model, the one to measure first.
    """

    candidates: list[str]
    reference: str
    champion: ModelVersion | None
    texts: list[dict[str, Any]]
    prompts: list[dict[str, Any]]


@dataclass
class Measurements:
    """What was found of each; of the checkpoint nothing where the candidate cannot run here."""

    candidate: Measured
    checkpoint: Measured
    champion: Measured


def measure_all(inputs: Inputs, settings: Evaluate, folder: Path) -> Measurements:
    """Measure each model in a process of its own, with `folder` for scratch.

    What was measured without failures is kept beside it, so that other gates need no new
    measurement.
    """
    conditions = conditions_of(inputs, settings)
    models = [inputs.candidates[0], inputs.reference, version_uri(inputs.champion)]
    key = digest_of([conditions, models, settings.remeasure_champion])
    kept = folder.parent / f"measured-{key[:16]}.json"
    if kept.is_file():
        log.info("evaluate: read what was measured before, in %s", kept)
        found = json.loads(kept.read_text())
        return Measurements(**{side: Measured(**found[side]) for side in found})
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        (scratch / "request.json").write_text(json.dumps(request_of(inputs, settings)))
        measured = measure_in(scratch, inputs, settings, conditions)
        sides = (measured.candidate, measured.champion)
        if not any(found.failures or found.unavailable for found in sides):
            (scratch / "measured.json").write_text(json.dumps(asdict(measured)))
            (scratch / "measured.json").replace(kept)
    return measured


def measure_in(scratch: Path, inputs: Inputs, settings: Evaluate, conditions: str) -> Measurements:
    candidate, reference = inputs.candidates[0], inputs.reference
    if execution_provider(candidate) != "cpu":  # before minutes are spent on the checkpoint
        log.info("evaluate: trying the candidate's execution provider")
        tried = measure(candidate, scratch / "tried", only_load=True)
        if tried.unavailable:
            return Measurements(tried, Measured(), Measured())
    log.info("evaluate: measuring the checkpoint %s", reference)
    checkpoint = measure(reference, scratch / "checkpoint")
    log.info("evaluate: measuring the candidate %s", candidate)
    found = measure(candidate, scratch / "candidate", scratch / "checkpoint")
    champion = measure_champion(inputs.champion, reference, settings, conditions, scratch)
    return Measurements(found, checkpoint, champion)


def request_of(inputs: Inputs, settings: Evaluate) -> dict[str, Any]:
    """What the measuring processes are told."""
    names = ("window", "max_tokens", "prompt_lengths", "repeats", "max_new_tokens", "batch_size")
    return {
        **{name: value for name, value in asdict(settings).items() if name in (*names, "harness")},
        "texts": [row["text"] for row in inputs.texts],
        "prompts": [prompt["inputs"] for prompt in inputs.prompts],
    }


def measure(
    uri: str, out: Path, reference: Path | None = None, only_load: bool = False
) -> Measured:
    """Measure a logged model in a process of its own, told by request.json beside `out`.

    A candidate whose process crashes does not load. RuntimeError where measuring itself fails.
    """
    out.mkdir()
    command = [sys.executable, "-m", "steps.evaluation.measure", uri, "--out", str(out)]
    command += ["--request", str(out.parent / "request.json")]
    command += ["--reference", str(reference)] if reference else []
    command += ["--only-load"] if only_load else []
    process = subprocess.run(command, cwd=ROOT)
    if (out / "measured.json").is_file():
        found = Measured(**json.loads((out / "measured.json").read_text()))
    elif (reference or only_load) and -process.returncode in CRASHES:
        died = signal.Signals(-process.returncode).name
        found = Measured({"loads": 0.0}, failures={"loads": f"its process died of {died}"})
    else:
        error = out / "error"
        reason = error.read_text() if error.is_file() else f"exit code {process.returncode}"
        raise RuntimeError(f"measuring {uri} failed: {reason}")
    found.metrics["size_mb"] = (mlflow.models.Model.load(uri).model_size_bytes or 0) / 1e6
    return found


def measure_champion(
    champion: ModelVersion | None,
    reference: str,
    settings: Evaluate,
    conditions: str,
    scratch: Path,
) -> Measured:
    """The champion's metrics, read from its version where they can be compared, else measured."""
    if champion is None:
        return Measured()
    comparable = champion.tags.get("conditions") == conditions and "metrics" in champion.tags
    if comparable and not settings.remeasure_champion:
        log.info("evaluate: the champion's metrics are read from its version")
        return Measured(json.loads(champion.tags["metrics"]))
    uri, own = version_uri(champion), champion.tags.get("evaluated_with", "")
    log.info("evaluate: measuring the champion %s", uri)
    try:
        checkpoint = scratch / "checkpoint"
        if content(own) != content(reference):  # its fidelity is to its own
            log.info("evaluate: measuring its checkpoint %s", own)
            checkpoint = scratch / "champions-checkpoint"
            measure(own, checkpoint)
        found = measure(uri, scratch / "champion", checkpoint)
    except (RuntimeError, MlflowException) as error:  # its files are gone, say
        found = Measured(failures={"champion": one_line(error)})
    if found.unavailable or found.failures:
        log.warning("evaluate: the champion: %s", found.unavailable or found.failures)
    return found


def content(uri: str) -> str:
    """The digest of a logged model's content."""
    return (mlflow.models.get_model_info(uri).metadata or {})["content"]


def conditions_of(inputs: Inputs, settings: Evaluate) -> str:
    """A digest of all that two measurements must share for their metrics to be compared."""
    shared = asdict(settings)
    for judgement in ("gates", "remeasure_champion"):
        shared.pop(judgement)
    code = digest_files(ROOT / "steps" / "evaluation")
    data = [inputs.texts, inputs.prompts]
    return digest_of([shared, data, code, versions(*LIBRARIES), machine()])


def version_uri(version: ModelVersion | None) -> str:
    """The URI of a version of a registered model, "" for none."""
    return f"models:/{version.name}/{version.version}" if version else ""


def machine() -> str:
    """The processor and how many cores of it: what makes times comparable."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model.group(1) if model else platform.processor()}, {cores} cores"


def execution_provider(uri: str) -> str:
    """The execution provider that a logged ONNX model runs on unless told otherwise."""
    flavor = mlflow.models.get_model_info(uri).flavors["python_function"]
    return flavor.get("config", {}).get("execution_provider", "cpu")
