"""Measure the ONNX model and the checkpoint side by side, and give a verdict.

    python -m steps.evaluate candidate=models:/m-… reference=models:/m-… evaluate=full

Of an ONNX model logged with several interfaces, `candidate` is their URIs with + between: one is
measured, the chat interface if it is there, and the verdict is that of their common weights. Each
model is loaded by its URI in a process of its own (steps/measure.py). The verdict is `passed`,
`failed` (a gate was not kept) or `not_evaluated` (this machine lacks the candidate's execution
provider).
"""

import json
import logging
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models.model import ModelInfo

from steps.command import entry_point
from steps.config import ROOT, Config, Evaluate, Gate
from steps.provenance import digest_file, digest_of
from steps.report import write_report
from steps.step import run_step, versions

log = logging.getLogger("steps.evaluate")

CODE = ("evaluate.py", "measure.py", "report.py", "report.html.j2")
LIBRARIES = ("mlflow", "onnxruntime-genai", "onnxruntime", "transformers", "torch")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of two logged models, and the verdict.

    `candidates` are the interfaces of one ONNX model, the measured one first. `gates` are dicts of
    metric, value, min, max and passed; `reasons` say in words what keeps the verdict from `passed`.
    `answers` are dicts of prompt, candidate and reference.
    """

    uri: str
    candidates: list[str]
    reference: str
    verdict: str
    reasons: list[str]
    gates: list[dict[str, Any]]
    candidate_metrics: dict[str, float]
    reference_metrics: dict[str, float]
    answers: list[dict[str, str]]
    report: str


def evaluate(candidates: list[str], reference: str, config: Config, folder: Path) -> Evaluation:
    """Measure reference and candidate in turn, judge, and write report.html."""
    texts, candidate = read_texts(config.evaluate), candidates[0]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        log.info("evaluate: measuring the reference %s", reference)
        left = measure(reference, texts, Path(scratch) / "reference")
        log.info("evaluate: measuring the candidate %s", candidate)
        right = measure(candidate, texts, Path(scratch) / "candidate", Path(scratch) / "reference")
    reference_metrics = {**left["metrics"], "size_mb": logged_size_mb(reference)}
    prompts = [messages[-1]["content"] for messages in texts["prompts"]]
    if unavailable := right.get("unavailable"):
        verdict, reasons, gates = (
            "not_evaluated",
            [f"this machine cannot run the candidate: {unavailable}"],
            [],
        )
        candidate_metrics, answered = {}, [""] * len(prompts)
    else:
        candidate_metrics = {**right["metrics"], "size_mb": logged_size_mb(candidate)}
        answered = right["answers"]
        gates = judge(candidate_metrics, {**config.evaluate.gates, **config.model.gates})
        reasons = [explain_gate(gate) for gate in gates if not gate["passed"]]
        verdict = "failed" if reasons else "passed"
    answers = zip(prompts, answered, left["answers"], strict=True)
    evaluation = Evaluation(
        uri=str(folder),
        candidates=candidates,
        reference=reference,
        verdict=verdict,
        reasons=reasons,
        gates=gates,
        candidate_metrics=candidate_metrics,
        reference_metrics=reference_metrics,
        answers=[
            dict(zip(("prompt", "candidate", "reference"), row, strict=True)) for row in answers
        ],
        report=str(folder / "report.html"),
    )
    write_report(asdict(evaluation), config, versions(*LIBRARIES), folder / "report.html")
    return evaluation


def read_texts(config: Evaluate) -> dict[str, Any]:
    """What the measuring processes get: texts to score, prompts to answer and to time."""
    rows = read_jsonl(config.texts, "text")
    if config.kinds:
        rows = [row for row in rows if row.get("kind") in config.kinds]
    if config.languages:
        rows = [row for row in rows if row.get("language") in config.languages]
    if not rows:
        raise ValueError(
            f"{config.texts} has no text of kinds {config.kinds} and languages {config.languages}."
        )
    topics = [
        "a lighthouse",
        "a market",
        "a long train journey",
        "an old library",
        "a garden",
        "a storm",
        "a bridge",
    ]
    return {
        "texts": [row["text"] for row in rows],
        "prompts": [row["messages"] for row in read_jsonl(config.prompts, "messages")],
        "speed_prompts": [
            f"Here is a passage. {rows[i % len(rows)]['text'][:600]} "
            f"Now write a long story about {topics[i % len(topics)]}."
            for i in range(config.repeats)
        ],
        "window": config.window,
        "max_tokens": config.max_tokens,
        "max_new_tokens": config.max_new_tokens,
    }


def read_jsonl(path: str, key: str) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, each of which must have `key`."""
    file = ROOT / Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Set evaluate.{'texts' if key == 'text' else 'prompts'}."
        )
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not row.get(key):
            raise ValueError(f"{path}, line {number} has no {key!r}.")
        rows.append(row)
    return rows


def measure(
    uri: str, texts: dict[str, Any], out: Path, reference: Path | None = None
) -> dict[str, Any]:
    """Run steps/measure.py on a logged model in a process of its own."""
    out.mkdir()
    (out / "texts.json").write_text(json.dumps(texts))
    command = [
        sys.executable,
        "-m",
        "steps.measure",
        uri,
        "--texts",
        str(out / "texts.json"),
        "--out",
        str(out),
    ]
    command += ["--reference", str(reference)] if reference else []
    process = subprocess.run(command, cwd=ROOT)
    measured = out / "measured.json"
    result = json.loads(measured.read_text()) if measured.is_file() else {}
    if process.returncode or "error" in result:
        reason = result.get("error", f"exit code {process.returncode}, see the lines above")
        raise RuntimeError(f"measuring {uri} failed: {reason}")
    return result


def interfaces_of(uris: list[str]) -> list[str]:
    """The immutable URIs of one ONNX model's interfaces, the chat interface first."""
    infos = {uri: mlflow.models.get_model_info(uri) for uri in uris}
    metadata = {uri: info.metadata or {} for uri, info in infos.items()}
    first, *others = (facts.get("provenance") for facts in metadata.values())
    if any(provenance != first for provenance in others):
        raise ValueError(f"candidate={'+'.join(uris)}: these are not of the same ONNX model.")
    chat_first = sorted(infos, key=lambda uri: metadata[uri].get("interface") != "chat")
    return list(dict.fromkeys(logged_model_uri(uri, infos[uri]) for uri in chat_first))


def logged_model_uri(uri: str, info: ModelInfo) -> str:
    """The immutable `models:/m-…` behind a URI, which may be a version or an alias that moves."""
    return f"models:/{info.model_id}" if info.model_id else uri


def judge(metrics: dict[str, float], gates: dict[str, Gate]) -> list[dict[str, Any]]:
    """Hold each gate against its metric; one that is missing or NaN fails."""
    results = []
    for metric, gate in gates.items():
        value = metrics.get(metric, math.nan)
        low, high = (
            (-math.inf if gate.min is None else gate.min),
            (math.inf if gate.max is None else gate.max),
        )
        results.append(
            {
                "metric": metric,
                "value": value,
                "min": gate.min,
                "max": gate.max,
                "passed": low <= value <= high,
            }
        )
    return results


def explain_gate(gate: dict[str, Any]) -> str:
    """A failed gate in words: the metric, its value, the bound, and by how much."""
    metric, value = gate["metric"], gate["value"]
    if math.isnan(value):
        return f"{metric} was not measured"
    if gate["max"] is not None and value > gate["max"]:
        return f"{metric} is {value:.4g}, above {gate['max']:g} by {value - gate['max']:.4g}"
    return f"{metric} is {value:.4g}, below {gate['min']:g} by {gate['min'] - value:.4g}"


def logged_size_mb(uri: str) -> float:
    """Size of a logged model's artifacts, in MB (10^6 bytes), as MLflow recorded it."""
    return (mlflow.models.Model.load(uri).model_size_bytes or 0) / 1e6


def publish(evaluation: Evaluation) -> None:
    """Log the metrics to the run and to every logged model, the report to the run."""
    measured = [(uri, evaluation.candidate_metrics) for uri in evaluation.candidates]
    for uri, metrics in [*measured, (evaluation.reference, evaluation.reference_metrics)]:
        mlflow.log_metrics(metrics, model_id=mlflow.models.get_model_info(uri).model_id)
    mlflow.log_metrics(evaluation.candidate_metrics)
    mlflow.log_metrics({f"reference_{k}": v for k, v in evaluation.reference_metrics.items()})
    mlflow.set_tags(
        {"verdict": evaluation.verdict, "verdict_reasons": "; ".join(evaluation.reasons)}
    )
    mlflow.log_artifact(evaluation.report)


def main(config: Config) -> Evaluation:
    for parameter, made_by in (("candidate", "log_pyfunc"), ("reference", "log_transformers")):
        if not getattr(config, parameter):
            raise ValueError(
                f"{parameter} is missing: pass the URI that {made_by} ended with, "
                f"as {parameter}=<uri>."
            )
    candidates = interfaces_of(str(config.candidate).split("+"))
    reference = str(config.reference)
    reference = logged_model_uri(reference, mlflow.models.get_model_info(reference))
    data = [
        ROOT / Path(path).expanduser() for path in (config.evaluate.texts, config.evaluate.prompts)
    ]
    return run_step(
        "evaluate",
        config,
        Evaluation,
        key={
            "models": [candidates, reference],
            "evaluate": asdict(config.evaluate),
            "gates": {metric: asdict(gate) for metric, gate in config.model.gates.items()},
            "data": digest_of([digest_file(path) for path in data if path.is_file()]),
            "tracking": mlflow.get_tracking_uri(),
            "versions": versions(*LIBRARIES),
        },
        code=[ROOT / "steps" / name for name in CODE],
        work=lambda folder: evaluate(candidates, reference, config, folder),
        publish=publish,
    )


if __name__ == "__main__":
    entry_point(main)
