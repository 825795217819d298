"""Say what `main` would run, what it would reuse, why, and what that takes. Nothing is changed.

    mlflow run . --env-manager local -e plan
    python -m steps.plan model=phi-3-mini-4k-instruct summary=plan.json

Each step is asked for its outcome, and none is made: no run (but the one that `mlflow run` opens
for whatever it starts), no folder, no weights. A step whose input has yet to be made may run, or
may not: its input may come out as it was.
"""

from dataclasses import asdict

from rich.console import Console

from slm.config import Config
from slm.evaluation.summary import table
from slm.planning import REUSED, Plan, plan
from slm.running.command import entry_point
from slm.running.costs import Cost
from slm.running.summary import note


def show(planned: Plan) -> None:
    """Print the steps as a table, and what they take beside what there is."""
    columns = {"step": "left", "does": "left", "seconds": "right", "disk GB": "right"}
    columns |= {"memory GB": "right", "figures": "left", "why": "left"}
    rows = [
        [
            *(step.step, step.does, about(step.cost.seconds, 0), about(disk_of(step.cost), 1)),
            *(about(step.cost.memory_gb, 1), step.basis, step.why),
        ]
        for step in planned.steps
    ]
    console, cost = Console(width=160, highlight=False), planned.cost
    console.print(table("Plan", columns, rows), "")
    if all(step.does == REUSED for step in planned.steps):
        console.print("Nothing to do: every outcome is reused")
        return
    unknown = any(step.does != REUSED and step.cost.seconds is None for step in planned.steps)
    besides = ", and what cannot be known: a download, say" if unknown else ""
    lines = [("Time", f"about {about(cost.seconds, 0)} s{besides}")]
    for need in planned.greatest():
        where = f"free in {need.where}" if need.where else "available"
        peak = f"about {about(need.gb, 1)} GB, of {need.free_gb:.1f} {where}"
        short = " (too little)" if need.lacks else " (it may not suffice)"
        lines.append((need.of.capitalize(), peak + short * (need.gb > need.free_gb)))
    for name, text in lines:
        console.print(f"{name:11} {text}", soft_wrap=True, markup=False)


def disk_of(cost: Cost) -> float | None:
    """What a step leaves, wherever; None if it is not known."""
    return None if cost.disk_gb is None else cost.disk_gb + cost.store_gb + cost.cache_gb


def about(value: float | None, digits: int) -> str:
    """A figure, "" if it is not known."""
    return "" if value is None else f"{value:,.{digits}f}"


def main(config: Config) -> None:
    planned = plan(config)
    show(planned)
    note(result=asdict(planned))


if __name__ == "__main__":
    entry_point(main)
