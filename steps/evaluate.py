"""Measure the ONNX model and the checkpoint side by side, and give a verdict.

    python -m steps.evaluate candidate=models:/m-… reference=models:/m-… evaluate=full
    python -m steps.evaluate "candidate=[models:/m-…, models:/m-…]" reference=models:/m-…

Several candidates are the interfaces of one ONNX model: one of them is measured, the chat interface
if it is there, and the verdict is that of their common weights. Each model is loaded by its URI in
a process of its own (slm/evaluation/worker.py). So is the champion, if the registry has one that
was not measured under the same conditions. The verdict is `passed`, `failed` (a gate was missed) or
`not_evaluated` (this machine lacks the candidate's execution provider).
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import PandasDataset, from_pandas
from mlflow.exceptions import MlflowException

from slm.config import Config
from slm.config.model import Baseline
from slm.config.packaging import Interface
from slm.errors import InputError
from slm.evaluation.data import read_long_text, read_prompts, read_texts
from slm.evaluation.gates import gates_of, judge
from slm.evaluation.harness import require_harness
from slm.evaluation.measure import (
    CONDITIONS,
    LIBRARIES,
    MEASURED_IN,
    Champion,
    Inputs,
    conditions_of,
    machine,
    measure_all,
)
from slm.evaluation.report import About, write_report
from slm.evaluation.tasks import accuracy, show_answers
from slm.evaluation.worker import Found
from slm.records import AnsweredPrompt, Evaluation, Judged, LoggedModel
from slm.registry.names import (
    CHAMPION,
    CONTENT,
    EVALUATED_WITH,
    cut,
    registered_name,
    version_uri,
    version_with_alias,
)
from slm.running.command import entry_point
from slm.running.run import run_step
from slm.running.tracking import shown_tracking_uri
from slm.running.work import versions


def evaluate(inputs: Inputs, conditions: str, config: Config, folder: Path) -> Evaluation:
    """Measure, judge, and write the report."""
    measured = measure_all(
        inputs, config.evaluate, conditions, config.paths.work, again="evaluate" in config.force
    )
    candidate, reference, champion = measured.candidate, measured.reference, measured.champion
    for found in (candidate, reference, champion):
        found.metrics |= accuracy(inputs.prompts, found.answers) if found.answers else {}
    gates: list[Judged] = []
    if candidate.unavailable:
        verdict = "not_evaluated"
        reasons = [f"this machine cannot run the candidate: {candidate.unavailable}"]
    else:
        baselines = {
            Baseline.reference: reference.metrics,
            Baseline.champion: champion.metrics if inputs.champion else None,
        }
        gates = judge(gates_of(config), candidate.metrics, baselines)
        reasons = reasons_of(gates, candidate)
        verdict = "failed" if reasons else "passed"
    evaluation = Evaluation(
        uri=str(folder),
        candidates=[model.uri for model in inputs.candidates],
        reference=inputs.reference.uri,
        champion=inputs.champion.uri if inputs.champion else "",
        verdict=verdict,
        reasons=reasons,
        gates=gates,
        candidate_metrics=candidate.metrics,
        reference_metrics=reference.metrics,
        champion_metrics=champion.metrics,
        answers=answers_of(inputs.prompts, candidate.answers, reference.answers),
        conditions=conditions,
    )
    about = About(
        series={"candidate": candidate.series, "reference": reference.series},
        machine=machine(),
        versions=versions(*LIBRARIES),
        digests=weight_digests(inputs.candidates[0], inputs.reference),
        provenance=inputs.candidates[0].provenance,
    )
    report, card = write_report(evaluation, about, config, folder)
    return replace(evaluation, report=str(report), model_card=card)


def answers_of(
    prompts: list[dict[str, Any]], candidate: list[str], reference: list[str]
) -> list[AnsweredPrompt]:
    """Each prompt with both answers."""
    return [
        AnsweredPrompt(
            messages=prompt["inputs"]["messages"],
            expectations=prompt.get("expectations") or {},
            candidate=candidate[i] if candidate else "",
            reference=reference[i] if reference else "",
        )
        for i, prompt in enumerate(prompts)
    ]


def reasons_of(gates: list[Judged], found: Found) -> list[str]:
    """In words: the gates that were missed, and what of the candidate could not be measured."""
    reasons, explained = [], set()
    for gate in (gate for gate in gates if not gate.passed):
        why = found.failures.get(gate.metric)
        explained.add(gate.metric)
        reasons.append(gate.words() + (f": {why}" if why else ""))
    for part, why in found.failures.items():
        # Failed checks without a gate are ignored, except `loads`.
        if part not in explained and (part not in found.metrics or part == "loads"):
            reasons.append(f"{part} could not be measured: {why}")
    return reasons


def incomplete(evaluation: Evaluation) -> str:
    """What was not measured, in words, "" for nothing.

    What a crash or an absent provider prevented may succeed by now.
    """
    if evaluation.verdict == "not_evaluated":
        return f"not evaluated before: {'; '.join(evaluation.reasons)}"
    missing = [gate.metric for gate in evaluation.gates if math.isnan(gate.value)]
    missing += ["the champion"] if evaluation.champion and not evaluation.champion_metrics else []
    return f"not measured before: {', '.join(missing)}" if missing else ""


def logged_pair(config: Config) -> tuple[list[LoggedModel], LoggedModel]:
    """The interfaces of one ONNX model, chat first, and its checkpoint's logged model.

    Raises InputError unless they are that, and of the configured model and target.
    """
    candidates = [logged(uri, "candidate", "log_pyfunc") for uri in config.candidate or []]
    reference = logged(str(config.reference), "reference", "log_transformers")
    first, *others = candidates
    if any(other.provenance != first.provenance for other in others):
        raise InputError(f"candidate={config.candidate}: these are not of the same ONNX model.")
    if first.provenance.origin.files != reference.provenance.files:
        raise InputError(
            f"reference={config.reference} is not the checkpoint that the candidate was exported "
            "from. Pass what log_transformers made of the same folder."
        )
    if (first.model, first.target) != (config.model.name, config.target_name):
        raise InputError(
            f"candidate is of model={first.model} and target={first.target}; those of "
            f"{config.model.name} and {config.target_name} have other gates. Pass its own."
        )
    chat_first = sorted(candidates, key=lambda model: model.interface != Interface.chat.value)
    return list({model.uri: model for model in chat_first}.values()), reference


def logged(uri: str, parameter: str, made_by: str) -> LoggedModel:
    """The model behind a parameter; InputError if it is none, or if another step made it."""
    try:
        model = LoggedModel.load(uri)
    except InputError as error:
        raise InputError(f"{parameter}={error} Pass the uri that {made_by} ends with.") from error
    if model.is_onnx != (parameter == "candidate"):
        raise InputError(f"{parameter}={uri} is not what {made_by} ends with. Pass its uri.")
    return model


def champion_against(candidate: LoggedModel, config: Config) -> Champion | None:
    """The champion under the candidate's registered name, unless it is of the same content."""
    name = registered_name(candidate, config.register)
    version = version_with_alias(mlflow.MlflowClient(), name, CHAMPION)
    if version is None or version.tags.get(CONTENT) == candidate.content:
        return None
    return Champion(version_uri(version), version.tags.get(EVALUATED_WITH, ""))


def weight_digests(*models: LoggedModel) -> dict[str, str]:
    """SHA-256 of the models' weights, by file."""
    files = {name: digest for model in models for name, digest in model.provenance.files.items()}
    weights = (".onnx", ".data", ".safetensors")
    return {name: digest for name, digest in files.items() if name.endswith(weights)}


def publish(evaluation: Evaluation, reused: bool, inputs: Inputs, config: Config) -> None:
    """Log metrics to the run and to every logged model, tables, and the report to the run.

    The answers' traces are with the run that made the evaluation.
    """
    run = mlflow.active_run()
    assert run is not None
    texts = from_pandas(pd.DataFrame(inputs.texts), name=Path(config.evaluate.texts).name)
    log_dataset(texts)
    measured = [(model, evaluation.candidate_metrics) for model in inputs.candidates]
    for model, metrics in [*measured, (inputs.reference, evaluation.reference_metrics)]:
        mlflow.log_metrics(metrics, model_id=model.model_id, dataset=texts)
        tags = {CONDITIONS: evaluation.conditions, MEASURED_IN: run.info.run_id}
        mlflow.MlflowClient().set_logged_model_tags(model.model_id, tags)
    mlflow.log_metrics(evaluation.candidate_metrics)
    for side in ("reference", "champion"):
        metrics = evaluation.metrics(side)
        mlflow.log_metrics({f"{side}_{name}": value for name, value in metrics.items()})
    mlflow.set_tags(
        {"verdict": evaluation.verdict, "verdict_reasons": cut("; ".join(evaluation.reasons))}
    )
    mlflow.log_artifact(evaluation.report)
    mlflow.log_text(evaluation.model_card, "model_card.md")
    answers = pd.DataFrame([asdict(answer) for answer in evaluation.answers])
    mlflow.log_table(answers.astype(str), "tables/answers.json")
    if evaluation.gates:
        gates = pd.DataFrame([asdict(gate) | {"of": gate.of.value} for gate in evaluation.gates])
        mlflow.log_table(gates.astype(str), "tables/gates.json")
    sides = {side: evaluation.metrics(side) for side in ("candidate", "reference", "champion")}
    table = pd.DataFrame(sides).rename_axis("metric").reset_index()
    mlflow.log_table(table, "tables/metrics.json")
    if not reused:
        show_answers(evaluation.answers, inputs.candidates[0].model_id)


def log_dataset(texts: PandasDataset) -> None:
    """Log it to the run; again if another run did at that moment, which MLflow 3.17 cannot stand.

    Waits for a store that looks for the dataset and adds it in one transaction.
    """
    try:
        mlflow.log_input(texts, context="evaluation")
    except MlflowException:
        mlflow.log_input(texts, context="evaluation")


def main(config: Config) -> Evaluation:
    for parameter, made_by in (("candidate", "log_pyfunc"), ("reference", "log_transformers")):
        if not getattr(config, parameter):
            raise InputError(
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
        read_long_text(config.evaluate),
    )
    conditions = conditions_of(inputs, config.evaluate)
    return run_step(
        "evaluate",
        config,
        Evaluation,
        key={
            "candidates": [model.uri for model in candidates],
            "reference": reference.uri,
            "champion": inputs.champion.uri if inputs.champion else "",
            "conditions": conditions,
            "remeasure_champion": config.evaluate.remeasure_champion,
            "gates": {name: asdict(gate) for name, gate in gates_of(config).items()},
            "tracking": shown_tracking_uri(),
        },
        make=lambda folder: evaluate(inputs, conditions, config, folder),
        stale=incomplete,
        publish=lambda evaluation, reused: publish(evaluation, reused, inputs, config),
    )


if __name__ == "__main__":
    entry_point(main)
