"""What `main` prints at its end: the steps, the verdict, what was registered, what to do next."""

from rich.console import Console
from rich.table import Table

from slm.evaluation.report import bounds, shown_metrics
from slm.records import Evaluation, RegisteredVersion, Registration

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
