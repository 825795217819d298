"""What `main` prints at its end: the steps, the verdict, what was registered, what to do next."""

import shlex
import sys
from pathlib import Path

from mlflow.utils.databricks_utils import get_databricks_host_creds
from rich.console import Console
from rich.table import Table

from slm.evaluation.report import bounds, shown_metrics
from slm.records import Evaluation, RegisteredVersion, Registration
from slm.redaction import redacted
from slm.running.tracking import store_variables
from slm.running.work import work_folder

SIDES = ("candidate", "reference")


def table(title: str, columns: dict[str, str], rows: list[list[str]]) -> Table:
    """A table without lines; `columns` are names and how they are justified."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, justify in columns.items():
        made.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*row)
    return made


def figures(evaluation: Evaluation) -> Table:
    """The metrics of both sides, and their gates."""
    gates: dict[str, list[str]] = {}
    for gate in evaluation.gates:
        gates.setdefault(gate.metric, []).append(bounds(gate))
    rows = []
    for metric in shown_metrics(evaluation):
        values = [evaluation.metrics(side).get(metric.name) for side in SIDES]
        shown = ["" if value is None else f"{value:,.4g}" for value in values]
        rows.append([metric.name, *shown, ", ".join(gates.get(metric.name, []))])
    columns = {"metric": "left", "ONNX": "right", "checkpoint": "right", "gate": "right"}
    return table(f"Verdict: {evaluation.verdict}", columns, rows)


def alias_of(made: RegisteredVersion) -> str:
    return f"@{made.alias}" if made.alias else "(no alias)"


def show(
    steps: list[list[str]],
    evaluation: Evaluation,
    registration: Registration,
    next_lines: dict[str, str],
) -> None:
    """Print it all. `steps` are rows of step, seconds and outcome; `next_lines` what to paste."""
    console = Console(width=120, highlight=False)
    columns = {"step": "left", "seconds": "right", "outcome": "left"}
    console.print(table("Steps", columns, steps), "", figures(evaluation), "")
    for reason in evaluation.reasons:
        console.print(f"  {reason}")
    lines = [
        ("Registered", f"{made.name} version {made.version} {alias_of(made)}")
        for made in registration.versions
    ]
    if evaluation.verdict == "passed" and not registration.promoted:
        lines.append(("Not champion", "; ".join(registration.reasons)))
    for name, text in [*lines, *next_lines.items()]:
        console.print(f"{name:11} {text}", soft_wrap=True, markup=False)


def next_lines(work: str, report: str, registered: str) -> dict[str, str]:
    """Where things lie, and what to do next: commands that work in any terminal and folder."""
    stores = store_variables()
    tracking, registry = (shlex.quote(redacted(uri)) for uri in stores.values())
    scripts = Path(sys.executable).parent
    mlflow_command = shlex.quote(str(scripts / "mlflow"))
    look = f"{mlflow_command} ui --backend-store-uri {tracking}"
    serve = f"{mlflow_command} models serve -m {registered} --env-manager local -p 5001"
    if registry != tracking:
        look += f" --registry-store-uri {registry}"
        serve = f"MLFLOW_REGISTRY_URI={registry} {serve}"
    # The scoring server starts uvicorn by name.
    serve = f"PATH={shlex.quote(str(scripts))}:$PATH MLFLOW_TRACKING_URI={tracking} {serve}"
    if any(uri.startswith("file:") for uri in stores.values()):  # MLflow 3.17 wants to be told so
        look, serve = (f"MLFLOW_ALLOW_FILE_STORE=true {line}" for line in (look, serve))
    if tracking.startswith("http"):
        look = tracking
    elif tracking.startswith("databricks"):
        look = f"{get_databricks_host_creds(tracking).host}/ml/experiments"
    return {
        "Work": str(work_folder(work)),
        "Report": report,
        "Look": look,
        "Serve": serve,
    }
