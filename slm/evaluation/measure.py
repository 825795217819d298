"""Measure models, each in a process of its own; what was measured is kept in the work folder.

A measurement is kept under the content of the model, what it was compared with, and the conditions:
a checkpoint is measured once for all its targets, and other gates need no new measurement.
"""

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
from mlflow.exceptions import MlflowException

from slm.config.common import ROOT
from slm.config.packaging import Evaluate
from slm.digests import digest_of
from slm.errors import KilledError, UserError, error_of, one_line
from slm.evaluation.worker import Found, Prompt, Request
from slm.records import LoggedModel, from_json
from slm.running.tracking import note_use, store_variables
from slm.running.work import code_digests, keep, versions
from slm.variables import variables
from slm_pyfunc.verify import PUBLIC_KEY

log = logging.getLogger("slm.measure")

LIBRARIES = ("mlflow", "onnxruntime-genai", "onnxruntime", "transformers", "torch")
WORKER = "slm.evaluation.worker"
# A process that ends so died of what the model made it do; otherwise something else was wrong.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
# Tags of a logged model: under which conditions its metrics were measured, and the run that logged
# them.
CONDITIONS, MEASURED_IN = "conditions", "measured_in"


@dataclass(frozen=True)
class Champion:
    """The URIs of the registered version that a candidate stands against, and of its checkpoint."""

    uri: str
    reference_uri: str


@dataclass(frozen=True)
class Inputs:
    """What is measured: logged models, the champion that they stand against, texts and prompts.

    `candidates` are the interfaces of one ONNX model, the one to measure first. `long_text` is
    scored as far as the model changes with the position.
    """

    candidates: list[LoggedModel]
    reference: LoggedModel
    champion: Champion | None
    texts: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    long_text: str


@dataclass(frozen=True)
class Measurement:
    """What was found of one model, in the folder `uri`."""

    uri: str
    found: Found


@dataclass
class Measurements:
    """What was found of each; nothing of the reference if the candidate cannot run here."""

    candidate: Found
    reference: Found
    champion: Found


@dataclass(frozen=True)
class Measuring:
    """How models are measured, and where it is kept: the same for all that are compared."""

    request: Request
    conditions: str
    work: str

    def measure(
        self, model: LoggedModel, against: Measurement | None = None, again: bool = False
    ) -> Measurement:
        """Measure a model, or read what was measured of it; with `again`, measure it anyway.

        An ONNX model is compared `against` a checkpoint's measurement.
        """
        kept = keep(
            "measure",
            self.work,
            Measurement,
            key={
                "model": model.content,
                "against": Path(against.uri).name if against else "",
                "conditions": self.conditions,
            },
            module=WORKER,
            make=lambda folder: run_worker(model, self.request, folder, against),
            stale=lambda m: failed_before(m.found),
            again=again,
        )
        note_use(kept.folder)  # the next process reads it
        if kept.reused:
            log.info("read what was measured of %s before, in %s", model.name, kept.folder)
        return kept.outcome

    def can_run(self, model: LoggedModel) -> Found:
        """Load a model and no more; its `unavailable` says why this machine cannot run it."""
        with tempfile.TemporaryDirectory() as scratch:
            return run_worker(model, self.request, Path(scratch), only_load=True).found


def failed_before(found: Found) -> str:
    """What of a model was not measured, in words, "" for nothing: it may succeed by now."""
    parts = ", ".join(found.failures) or found.unavailable
    return f"it was not measured whole: {parts}" if parts else ""


def measure_all(
    inputs: Inputs, settings: Evaluate, conditions: str, work: str, again: bool = False
) -> Measurements:
    """Measure the reference, the candidate and the champion; `again`, the first two in any case."""
    measuring = Measuring(request_of(inputs, settings), conditions, work)
    candidate = inputs.candidates[0]
    if candidate.execution_provider != "cpu":  # before minutes are spent on the checkpoint
        log.info("trying the candidate's execution provider")
        tried = measuring.can_run(candidate)
        if tried.unavailable:
            return Measurements(tried, Found(), Found())
    log.info("measuring the checkpoint %s", inputs.reference.uri)
    reference = measuring.measure(inputs.reference, again=again)
    log.info("measuring the candidate %s", candidate.uri)
    found = measuring.measure(candidate, reference, again).found
    champion = Found()
    if inputs.champion:
        champion = measure_champion(
            inputs.champion, inputs.reference, reference, measuring, settings.remeasure_champion
        )
    return Measurements(found, reference.found, champion)


def measure_champion(
    champion: Champion,
    reference: LoggedModel,
    measured: Measurement,
    measuring: Measuring,
    again: bool,
) -> Found:
    """The champion's metrics as they were logged, if they can be compared; else measured.

    A champion exported from another checkpoint is compared with that one. One that is broken, or
    whose files are gone, stops nothing: `failures` say so.
    """
    try:
        model = LoggedModel.load(champion.uri)
        if not again and (metrics := logged_metrics(model, measuring.conditions)):
            log.info("the champion's metrics are read from its logged model")
            return Found(metrics)
        log.info("measuring the champion %s", champion.uri)
        own = LoggedModel.load(champion.reference_uri)
        if own.content != reference.content:
            log.info("measuring its checkpoint %s", own.uri)
            measured = measuring.measure(own)
        found = measuring.measure(model, measured, again).found
    except (UserError, MlflowException) as error:
        found = Found(failures={"champion": one_line(error)})
    if found.unavailable or found.failures:
        log.warning("the champion: %s", found.unavailable or found.failures)
    return found


def logged_metrics(model: LoggedModel, conditions: str) -> dict[str, float]:
    """The metrics that a run logged to the model under these conditions, none if none did."""
    stored = mlflow.get_logged_model(model.model_id)
    if stored.tags.get(CONDITIONS) != conditions:
        return {}
    run = stored.tags.get(MEASURED_IN)
    return {m.key: m.value for m in stored.metrics or [] if m.run_id == run}


def request_of(inputs: Inputs, settings: Evaluate) -> Request:
    """What the measuring processes are told."""
    prompts = [prompt["inputs"] for prompt in inputs.prompts]
    return Request(
        texts=[row["text"] for row in inputs.texts],
        kinds=[kind_of(row) for row in inputs.texts],
        long_text=inputs.long_text,
        prompts=[Prompt(p["messages"], p.get("max_tokens")) for p in prompts],
        window=settings.window,
        max_tokens=settings.max_tokens,
        prompt_lengths=settings.prompt_lengths,
        repeats=settings.repeats,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        harness=asdict(settings.harness),
    )


def kind_of(row: dict[str, Any]) -> str:
    """The kind and language of a text, as a part of a metric's name: `prose-en`."""
    words = (str(row[field]) for field in ("kind", "language") if row.get(field))
    return "-".join(re.sub(r"\W+", "_", word) for word in words) or "other"


def run_worker(
    model: LoggedModel,
    request: Request,
    out: Path,
    against: Measurement | None = None,
    only_load: bool = False,
) -> Measurement:
    """Measure a logged model in a process of its own, which leaves its files in `out`.

    An ONNX model whose process crashes does not load. KilledError if the process was killed,
    another UserError if measuring itself fails.
    """
    told = out / "request.json"
    told.write_text(json.dumps(asdict(request)))
    command = [sys.executable, "-m", WORKER, model.uri, "--out", str(out), "--request", str(told)]
    command += ["--reference", against.uri] if against else []
    command += ["--only-load"] if only_load else []
    unverified = {PUBLIC_KEY: ""}  # an unsigned champion can still be measured
    environment = {**variables(), **store_variables(), **unverified}
    process = subprocess.run(command, cwd=ROOT, env=environment)
    if (out / "found.json").is_file():
        found = from_json(Found, json.loads((out / "found.json").read_text()))
    elif model.is_onnx and -process.returncode in CRASHES:
        died = signal.Signals(-process.returncode).name
        found = Found({"loads": 0.0}, failures={"loads": f"its process died of {died}"})
    elif process.returncode == -signal.SIGKILL:
        raise KilledError(f"what measures {model.uri}")
    else:
        error = out / "error"
        reason = error.read_text() if error.is_file() else f"exit code {process.returncode}"
        raise error_of(f"measuring {model.uri} failed: {reason}", process.returncode)
    found.metrics["size_mb"] = model.size_mb
    return Measurement(str(out), found)


def conditions_of(inputs: Inputs, settings: Evaluate) -> str:
    """A digest of all that two measurements must share for their metrics to be compared."""
    shared = asdict(settings)
    for judgement in ("gates", "remeasure_champion"):
        shared.pop(judgement)
    data = [inputs.texts, inputs.prompts, inputs.long_text]
    return digest_of([shared, data, code_digests(WORKER), versions(*LIBRARIES), machine()])


def machine() -> str:
    """The processor and how many cores of it: what makes times comparable."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model.group(1) if model else platform.processor()}, {cores} cores"
