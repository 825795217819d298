"""Measure the ONNX model and the checkpoint side by side, and give a verdict.

    python -m steps.evaluate candidate=models:/m-… reference=models:/m-… evaluate=full

Of an ONNX model logged with several interfaces, `candidate` is their URIs with + between: one is
measured, the chat interface if it is there, and the verdict is that of their common weights. Each
model is loaded by its URI in a process of its own (steps/evaluation/measure.py), and so is the
champion, where the registry has one that was not measured under the same conditions. The verdict is
`passed`, `failed` (a gate was not kept) or `not_evaluated` (this machine lacks the candidate's
execution provider).
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities.model_registry import ModelVersion

from steps.command import entry_point
from steps.config import ROOT, Baseline, Config
from steps.evaluation.data import read_prompts, read_texts
from steps.evaluation.harness import require_harness
from steps.evaluation.measure import Measured
from steps.evaluation.measurements import (
    LIBRARIES,
    Inputs,
    conditions_of,
    machine,
    measure_all,
    version_uri,
)
from steps.evaluation.report import write_report
from steps.evaluation.tasks import accuracy, show_answers
from steps.gates import explain, judge
from steps.registry import CHAMPION, registered_name, version_with_alias
from steps.step import run_step, versions

log = logging.getLogger("steps.evaluate")

CODE = [ROOT / "steps" / name for name in ("evaluate.py", "gates.py", "evaluation")]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of two logged models, and the verdict.

    `candidates` are the interfaces of one ONNX model, the measured one first; `champion` is the
    version `models:/name/version` that stood against it, "" for none. `gates` are those of
    steps/gates.py; `reasons` say in words what keeps the verdict from `passed`. `answers` are dicts
    of messages, expectations, candidate and reference. Metrics that were measured under the same
    `conditions` can be compared. `model_card` is text in Markdown, `report` the path of a page.
    """

    uri: str
    candidates: list[str]
    reference: str
    champion: str
    verdict: str
    reasons: list[str]
    gates: list[dict[str, Any]]
    candidate_metrics: dict[str, float]
    reference_metrics: dict[str, float]
    champion_metrics: dict[str, float]
    answers: list[dict[str, Any]]
    conditions: str
    report: str
    model_card: str


def evaluate(inputs: Inputs, config: Config, folder: Path) -> Evaluation:
    """Measure, judge, and write the report."""
    measured = measure_all(inputs, config.evaluate, folder.parent)
    candidate, checkpoint, champion = measured.candidate, measured.checkpoint, measured.champion
    answers = answers_of(inputs.prompts, candidate.answers, checkpoint.answers)
    for found in (candidate, checkpoint, champion):
        found.metrics |= accuracy(inputs.prompts, found.answers) if found.answers else {}
    gates: list[dict[str, Any]] = []
    if candidate.unavailable:
        verdict = "not_evaluated"
        reasons = [f"this machine cannot run the candidate: {candidate.unavailable}"]
    else:
        baselines = {
            Baseline.checkpoint: checkpoint.metrics,
            Baseline.champion: champion.metrics if inputs.champion else None,
        }
        gates = judge({**config.evaluate.gates, **config.model.gates}, candidate.metrics, baselines)
        reasons = reasons_of(gates, candidate)
        verdict = "failed" if reasons else "passed"
    facts: dict[str, Any] = {
        "candidates": inputs.candidates,
        "reference": inputs.reference,
        "champion": version_uri(inputs.champion),
        "verdict": verdict,
        "reasons": reasons,
        "gates": gates,
        "candidate_metrics": candidate.metrics,
        "reference_metrics": checkpoint.metrics,
        "champion_metrics": champion.metrics,
        "answers": answers,
        "conditions": conditions_of(inputs, config.evaluate),
    }
    about = {
        "series": {"candidate": candidate.series, "reference": checkpoint.series},
        "machine": machine(),
        "versions": versions(*LIBRARIES),
        "digests": weight_digests(inputs.candidates[0], inputs.reference),
        "texts": len(inputs.texts),
    }
    report, card = write_report(facts, about, config, folder)
    return Evaluation(uri=str(folder), report=str(report), model_card=card, **facts)


def answers_of(
    prompts: list[dict[str, Any]], candidate: list[str], reference: list[str]
) -> list[dict[str, Any]]:
    """Each prompt with both answers, "" where a model gave none."""
    return [
        {
            "messages": prompt["inputs"]["messages"],
            "expectations": prompt.get("expectations") or {},
            "candidate": candidate[i] if candidate else "",
            "reference": reference[i] if reference else "",
        }
        for i, prompt in enumerate(prompts)
    ]


def reasons_of(gates: list[dict[str, Any]], found: Measured) -> list[str]:
    """In words: the gates that were not kept, and what of the candidate could not be measured."""
    reasons = []
    for gate in (gate for gate in gates if not gate["passed"]):
        why = found.failures.get(gate["metric"])
        reasons.append(explain(gate) + (f": {why}" if why else ""))
    parts = {part: why for part, why in found.failures.items() if part not in found.metrics}
    return reasons + [f"{part} could not be measured: {why}" for part, why in parts.items()]


def interfaces_of(uris: list[str]) -> list[str]:
    """The immutable URIs of one ONNX model's interfaces, the chat interface first."""
    metadata = {uri: mlflow.models.get_model_info(uri).metadata or {} for uri in uris}
    first, *others = (facts.get("provenance") for facts in metadata.values())
    if any(provenance != first for provenance in others):
        raise ValueError(f"candidate={'+'.join(uris)}: these are not of the same ONNX model.")
    chat_first = sorted(uris, key=lambda uri: metadata[uri].get("interface") != "chat")
    return list(dict.fromkeys(logged_model_uri(uri) for uri in chat_first))


def logged_model_uri(uri: str) -> str:
    """The immutable `models:/m-…` behind a URI, which may be a version or an alias that moves."""
    model_id = mlflow.models.get_model_info(uri).model_id
    return f"models:/{model_id}" if model_id else uri


def champion_against(candidate: str, config: Config) -> ModelVersion | None:
    """The champion under the candidate's registered name, unless it is of the same content."""
    metadata = mlflow.models.get_model_info(candidate).metadata or {}
    name = registered_name(metadata, config.register)
    champion = version_with_alias(mlflow.MlflowClient(), name, CHAMPION)
    if champion is None or champion.tags.get("content") == metadata["content"]:
        return None
    return champion


def weight_digests(*uris: str) -> dict[str, str]:
    """SHA-256 of the models' weights, by file."""
    digests: dict[str, str] = {}
    for uri in uris:
        digests |= (mlflow.models.get_model_info(uri).metadata or {})["provenance"]["files"]
    weights = (".onnx", ".data", ".safetensors")
    return {name: digest for name, digest in digests.items() if name.endswith(weights)}


def publish(evaluation: Evaluation, inputs: Inputs, config: Config) -> None:
    """Log metrics to the run and to every logged model, tables, and the report to the run."""
    texts = from_pandas(pd.DataFrame(inputs.texts), name=Path(config.evaluate.texts).name)
    mlflow.log_input(texts, context="evaluation")
    measured = [(uri, evaluation.candidate_metrics) for uri in evaluation.candidates]
    for uri, metrics in [*measured, (evaluation.reference, evaluation.reference_metrics)]:
        model_id = mlflow.models.get_model_info(uri).model_id
        mlflow.log_metrics(metrics, model_id=model_id, dataset=texts)
    mlflow.log_metrics(evaluation.candidate_metrics)
    for side in ("reference", "champion"):
        metrics = getattr(evaluation, f"{side}_metrics")
        mlflow.log_metrics({f"{side}_{name}": value for name, value in metrics.items()})
    mlflow.set_tags(
        {"verdict": evaluation.verdict, "verdict_reasons": "; ".join(evaluation.reasons)[:5000]}
    )
    mlflow.log_artifact(evaluation.report)
    mlflow.log_text(evaluation.model_card, "model_card.md")
    mlflow.log_table(pd.DataFrame(evaluation.answers).astype(str), "tables/answers.json")
    if evaluation.gates:
        mlflow.log_table(pd.DataFrame(evaluation.gates).astype(str), "tables/gates.json")
    sides = ("candidate", "reference", "champion")
    metrics_table = pd.DataFrame({s: getattr(evaluation, f"{s}_metrics") for s in sides})
    mlflow.log_table(metrics_table.rename_axis("metric").reset_index(), "tables/metrics.json")
    measured_model = mlflow.models.get_model_info(evaluation.candidates[0])
    show_answers(evaluation.answers, measured_model.model_id)


def main(config: Config) -> Evaluation:
    for parameter, made_by in (("candidate", "log_pyfunc"), ("reference", "log_transformers")):
        if not getattr(config, parameter):
            raise ValueError(
                f"{parameter} is missing: pass the URI that {made_by} ended with, "
                f"as {parameter}=<uri>."
            )
    require_harness(config.evaluate.harness.tasks)
    candidates = interfaces_of(str(config.candidate).split("+"))
    inputs = Inputs(
        candidates,
        logged_model_uri(str(config.reference)),
        champion_against(candidates[0], config),
        read_texts(config.evaluate),
        read_prompts(config.evaluate),
    )
    return run_step(
        "evaluate",
        config,
        Evaluation,
        key={
            "models": [candidates, inputs.reference, version_uri(inputs.champion)],
            "conditions": conditions_of(inputs, config.evaluate),
            "remeasure_champion": config.evaluate.remeasure_champion,
            "gates": asdict(config.evaluate)["gates"] | asdict(config.model)["gates"],
            "tracking": mlflow.get_tracking_uri(),
        },
        code=CODE,
        work=lambda folder: evaluate(inputs, config, folder),
        # An execution provider may be there by now, and to ask takes seconds.
        still_there=lambda evaluation: evaluation.verdict != "not_evaluated",
        publish=lambda evaluation: publish(evaluation, inputs, config),
    )


if __name__ == "__main__":
    entry_point(main)
