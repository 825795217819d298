"""Run every step in turn, from a model's source to registered versions.

mlflow run . --env-manager local
python -m steps.main model=phi-3-mini-4k-instruct target=cuda-int4-rtn-block-32
"""

import logging
import sys
from pathlib import Path
from typing import Any

import mlflow
from hydra.core.hydra_config import HydraConfig
from mlflow.exceptions import ExecutionException
from rich.console import Console
from rich.table import Table

from steps.command import entry_point, join_overrides
from steps.config import ROOT, Config
from steps.evaluation.report import METRICS, bounds
from steps.step import mlflow_run, shown_tracking_uri

log = logging.getLogger("steps.main")


def package(model: str, target: str, overrides: str) -> dict[str, dict[str, Any]]:
    """Chain the steps through `mlflow.run`; return their outcomes, `duration_s` and `reused`."""
    outcomes: dict[str, dict[str, Any]] = {}

    def run(step: str, **inputs: str) -> str:
        log.info("main: step %d of 6: %s", len(outcomes) + 1, step)
        parameters = {"model": model, "target": target, "overrides": overrides, **inputs}
        outcomes[step] = run_child(step, parameters)
        return outcomes[step]["uri"]

    checkpoint = run("fetch")
    onnx = run("export_onnx", source=checkpoint)
    candidate = run("log_pyfunc", source=onnx)
    reference = run("log_transformers", source=checkpoint)
    evaluation = run("evaluate", candidate=candidate, reference=reference)
    run("register", source=evaluation)
    return outcomes


def run_child(step: str, parameters: dict[str, str]) -> dict[str, Any]:
    """Run one entry point as a child run; raise with the step's own error where it fails."""
    parent = mlflow.active_run()
    assert parent is not None
    try:
        submitted = mlflow.run(
            str(ROOT),
            entry_point=step,
            parameters=parameters,
            experiment_id=parent.info.experiment_id,
            run_name=step,
            env_manager="local",
        )
    except ExecutionException as error:
        children = mlflow.MlflowClient().search_runs(
            [parent.info.experiment_id],
            filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        reason = children[0].data.tags.get("error", str(error)) if children else str(error)
        raise RuntimeError(f"{step} failed: {reason}") from error
    run = mlflow.get_run(submitted.run_id)
    outcome = mlflow.artifacts.load_dict(f"runs:/{submitted.run_id}/result.json")["outcome"]
    return {
        **outcome,
        "duration_s": run.data.metrics["duration_s"],
        "reused": run.data.tags["reused"] == "true",
    }


def show(outcomes: dict[str, dict[str, Any]]) -> None:
    """Print what was made, where it lies, and what to look at next."""
    console = Console(width=120, highlight=False)
    steps = Table(title="Steps", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("step", "seconds", "outcome"):
        steps.add_column(
            column, justify="right" if column == "seconds" else "left", overflow="fold"
        )
    for step, outcome in outcomes.items():
        steps.add_row(
            step,
            f"{outcome['duration_s']:.1f}",
            ("reused " if outcome["reused"] else "") + outcome["uri"],
        )
    evaluation, registration = outcomes["evaluate"], outcomes["register"]
    candidate, reference = evaluation["candidate_metrics"], evaluation["reference_metrics"]
    figures = Table(
        title=f"Verdict: {evaluation['verdict']}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in ("metric", "ONNX", "checkpoint", "gate"):
        figures.add_column(column, justify="left" if column == "metric" else "right")
    gates: dict[str, str] = {}
    for gate in evaluation["gates"]:
        shown = [gates[gate["metric"]]] if gate["metric"] in gates else []
        gates[gate["metric"]] = ", ".join([*shown, bounds(gate)])
    for metric in reference | candidate:
        if metric in METRICS and metric != "scored_tokens":
            values = [f"{m[metric]:,.4g}" if metric in m else "" for m in (candidate, reference)]
            figures.add_row(metric, *values, gates.get(metric, ""))
    console.print(steps, "", figures, "")
    for reason in evaluation["reasons"]:
        console.print(f"  {reason}")
    for version in registration["versions"]:
        alias = f" @{version['alias']}" if version["alias"] else " (no alias)"
        console.print(
            f"Registered  {version['name']} version {version['version']}{alias}", soft_wrap=True
        )
    if evaluation["verdict"] == "passed" and not registration["promoted"]:
        console.print(f"Not champion: {'; '.join(registration['reasons'])}", soft_wrap=True)
    console.print(f"Report      {evaluation['report']}", soft_wrap=True)
    tracking, mlflow_command = (
        shown_tracking_uri(),
        str(Path(sys.executable).parent / "mlflow"),
    )
    mlflow_command = mlflow_command.removeprefix(f"{Path.cwd()}/")
    at_home = tracking == f"sqlite:///{Path.cwd() / 'mlflow.db'}"  # MLflow's default here
    look = f"{mlflow_command} ui" + ("" if at_home else f" --backend-store-uri {tracking}")
    serve = "" if at_home else f"MLFLOW_TRACKING_URI={tracking} "
    serve += f"{mlflow_command} models serve -m {registration['uri']} --env-manager local -p 5001"
    console.print(
        f"Look        {tracking if tracking.startswith('http') else look}", soft_wrap=True
    )
    console.print(f"Serve       {serve}", soft_wrap=True)


def main(config: Config) -> None:
    hydra = HydraConfig.get()
    choices = hydra.runtime.choices
    chosen = ("model=", "target=")
    search_path = [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    own_conf = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    search_path += [f"hydra.searchpath=[file://{path}]" for path in own_conf]
    own = [o for o in hydra.overrides.task if not o.startswith(chosen)]
    overrides = join_overrides([*search_path, *own])
    with mlflow_run("main"):
        mlflow.log_params({"model.name": config.model.name, "target.name": config.target.name})
        outcomes = package(choices["model"], choices["target"], overrides)
        evaluation = outcomes["evaluate"]
        mlflow.set_tags(
            {"verdict": evaluation["verdict"], "registered": outcomes["register"]["uri"]}
        )
        mlflow.log_metrics(
            {f"{step}.duration_s": outcome["duration_s"] for step, outcome in outcomes.items()}
        )
        mlflow.log_metrics(evaluation["candidate_metrics"])
        mlflow.log_dict(outcomes, "result.json")
    show(outcomes)


if __name__ == "__main__":
    entry_point(main)
