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
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.command import entry_point
from steps.config import ROOT, Baseline, Config, Gate
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
from steps.evaluation.report import CHECKS, METRICS, write_report
from steps.evaluation.tasks import accuracy, show_answers
from steps.gates import explain, judge
from steps.registry import CHAMPION, registered_name, version_with_alias
from steps.step import one_line, run_step, versions

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
    measured = measure_all(inputs, config.evaluate, folder)
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
        gates = judge(gates_of(config), candidate.metrics, baselines)
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
    }
    report, card = write_report(facts, about, config, folder)
    return Evaluation(uri=str(folder), report=str(report), model_card=card, **facts)


def gates_of(config: Config) -> dict[str, Gate]:
    """The gates of conf/evaluate, those of the model's file in their place by name.

    Raises ValueError where one bounds a metric that nobody measures.
    """
    gates = {**config.evaluate.gates, **config.model.gates}
    for name, gate in gates.items():
        metric = re.sub(r"_(at_\d+|ci95_low|ci95_high)$", "", gate.metric or name)
        if metric not in METRICS | CHECKS and "/" not in metric:
            valid = ", ".join([*CHECKS, *METRICS])
            raise ValueError(f"the gate {name} bounds {metric}, which is no metric; valid: {valid}")
    return gates


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
    reasons, explained = [], set()
    for gate in (gate for gate in gates if not gate["passed"]):
        why = found.failures.get(gate["metric"])
        explained.add(gate["metric"])
        reasons.append(explain(gate) + (f": {why}" if why else ""))
    for part, why in found.failures.items():
        # A check that failed and has no gate is nobody's business, but for one.
        if part not in explained and (part not in found.metrics or part == "loads"):
            reasons.append(f"{part} could not be measured: {why}")
    return reasons


def is_complete(evaluation: Evaluation) -> bool:
    """Whether all was measured; what a crash or an absent provider prevented may succeed by now."""
    everything = not any(math.isnan(gate["value"]) for gate in evaluation.gates)
    champion = bool(evaluation.champion_metrics) or not evaluation.champion
    return everything and champion and evaluation.verdict != "not_evaluated"


def logged_pair(config: Config) -> tuple[list[str], str]:
    """The immutable URIs of one ONNX model's interfaces, chat first, and of its checkpoint.

    Raises ValueError unless they are that, and of the configured model and target.
    """
    uris = str(config.candidate).split("+")
    candidates = {uri: logged(uri, "candidate", "log_pyfunc") for uri in uris}
    reference = logged(str(config.reference), "reference", "log_transformers")
    first, *others = candidates.values()
    provenance, model = first["provenance"], first["model"]
    if any(other["provenance"] != provenance for other in others):
        raise ValueError(f"candidate={config.candidate}: these are not of the same ONNX model.")
    if provenance.get("checkpoint", {}).get("files") != reference["provenance"]["files"]:
        raise ValueError(
            f"reference={config.reference} is not the checkpoint that the candidate was exported "
            "from. Pass what log_transformers made of the same folder."
        )
    if (model, provenance["target"]) != (config.model.name, config.target.name):
        raise ValueError(
            f"candidate is of model={model} and target={provenance['target']}; those of "
            f"{config.model.name} and {config.target.name} have other gates. Pass its own."
        )
    chat_first = sorted(candidates.values(), key=lambda one: one["interface"] != "chat")
    return list(dict.fromkeys(one["uri"] for one in chat_first)), reference["uri"]


def logged(uri: str, parameter: str, made_by: str) -> dict[str, Any]:
    """A logged model's metadata and immutable `uri`; the given one may be a version or an alias.

    Raises ValueError where another step made it.
    """
    try:
        info = mlflow.models.get_model_info(uri)
    except (MlflowException, OSError) as error:
        reason = one_line(error)
        raise ValueError(f"{parameter}={uri} is not a logged model: {reason}") from error
    metadata = info.metadata or {}
    of_onnx = "target" in metadata.get("provenance", {})
    if not info.model_id or "content" not in metadata or of_onnx != (parameter == "candidate"):
        raise ValueError(f"{parameter}={uri} is not what {made_by} ends with. Pass its uri.")
    return {**metadata, "uri": f"models:/{info.model_id}"}


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
    candidates, reference = logged_pair(config)
    inputs = Inputs(
        candidates,
        reference,
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
            "gates": {name: asdict(gate) for name, gate in gates_of(config).items()},
            "tracking": mlflow.get_tracking_uri(),
        },
        code=CODE,
        work=lambda folder: evaluate(inputs, config, folder),
        still_there=is_complete,
        publish=lambda evaluation: publish(evaluation, inputs, config),
    )


if __name__ == "__main__":
    entry_point(main)
