"""Say what `main` would run, what it would reuse, why, and what that takes. Nothing is changed.

    mlflow run . --env-manager local -e plan
    python -m steps.plan model=phi-3-mini-4k-instruct summary=plan.json

Each step is asked for its outcome, and none is made: no run (but the one that `mlflow run` opens
for whatever it starts), no folder, no weights. A step whose input has yet to be made may run, or
may not: its input may come out as it was.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from slm.config import Config
from slm.evaluation.summary import table
from slm.records import Checkpoint
from slm.registry.kinds import require_registry
from slm.running.chain import Link, kept, of_first_target, of_target, pipeline
from slm.running.command import entry_point
from slm.running.costs import Cost, Size, cost_of
from slm.running.run import Ask
from slm.running.summary import note
from slm.running.work import NotKept, records, work_folder
from slm.seal import require_key_to_sign
from slm.sources.adapter import sources_of
from slm.sources.weights import read_tensors

REUSED, RUNS, MAY_RUN = "reused", "runs", "may run"


@dataclass(frozen=True)
class Planned:
    """What would become of a step, and why; `basis` says where the figures of its cost are from."""

    step: str
    does: str
    why: str
    cost: Cost
    basis: str = ""


@dataclass(frozen=True)
class Plan:
    """All steps; what they take together if all that may run do; and what this machine has."""

    steps: list[Planned]
    cost: Cost
    work: str
    free_disk_gb: float
    available_memory_gb: float


def plan(config: Config) -> Plan:
    """Ask every step in turn. InputError where a step would refuse what it is given."""
    require_registry(config.register)
    require_key_to_sign(config.signing)
    config = of_first_target(config)
    links = pipeline(config)
    work = work_folder(config.paths.work)
    outcomes: dict[str, Any] = {}
    found = [(link, *ask(link, of_target(config, link.target), outcomes)) for link in links]
    size = size_of(config, outcomes.get("fetch"))
    steps = [
        Planned(link.name, does, why, *cost)
        for link, does, why in found
        for own in [of_target(config, link.target)]
        for cost in [costing(link.step, own, size) if does != REUSED else (Cost(),)]
    ]
    return Plan(
        steps,
        together([planned.cost for planned in steps if planned.does != REUSED]),
        str(work),
        shutil.disk_usage(next(p for p in (work, *work.parents) if p.exists())).free / 1e9,
        psutil.virtual_memory().available / 1e9,
    )


def ask(link: Link, config: Config, outcomes: dict[str, Any]) -> tuple[str, str]:
    """What a step would do, and why; its outcome goes to the others if it is kept."""
    waits_for = [step for step in link.needs if step not in outcomes]
    if waits_for:
        before = records(work_folder(config.paths.work) / link.step)
        if not any(r.get("of", {}).get("model") == config.model.name for r in before):
            return RUNS, f"never made of {config.model.name}"
        return MAY_RUN, f"if {' or '.join(waits_for)} ends otherwise"
    try:
        outcomes[link.name] = kept(link.step, config, link.inputs(outcomes), Ask.look)
    except NotKept as why:
        return RUNS, str(why)
    return REUSED, outcomes[link.name].uri


def costing(step: str, config: Config, size: Size | None) -> tuple[Cost, str]:
    """What a step takes: as it took last time, else by the size of the model."""
    cost = Cost() if size is None else cost_of(step, size, config)
    same = {"model": config.model.name, "target": config.target.name}
    last = max(
        (r for r in records(work_folder(config.paths.work) / step) if r.get("of") == same),
        key=lambda record: record["made"],
        default=None,
    )
    if last is None:
        return cost, "" if size is None else "by size"
    return Cost(cost.disk_gb, last["peak_rss_mb"] / 1e3, last["made_s"]), "as last time"


def size_of(config: Config, checkpoint: Checkpoint | None) -> Size | None:
    """The model's size: of the checkpoint, else as conf/ or its source says; None if none does."""
    if checkpoint is not None:
        tensors = read_tensors(Path(checkpoint.uri), checkpoint.source).values()
        return Size(sum(tensor.size for tensor in tensors) / 1e9, checkpoint.size_mb / 1e3)
    source, parameters = config.model.source or "", config.model.parameters
    stored = 4 if source.endswith(".gguf") else 2  # bytes: dequantized to float32, or in bfloat16
    if parameters:
        return Size(parameters / 1e9, stored * parameters / 1e9)
    checkpoint_gb = sources_of(config.model)[1].weights_gb()
    return None if checkpoint_gb is None else Size(checkpoint_gb / stored, checkpoint_gb)


def together(costs: list[Cost]) -> Cost:
    """Steps one after the other: disk and time add up, memory is that of the largest."""
    disk, memory, seconds = (
        [value for cost in costs if (value := getattr(cost, name)) is not None]
        for name in ("disk_gb", "memory_gb", "seconds")
    )
    return Cost(sum(disk), max(memory, default=0.0), sum(seconds))


def show(planned: Plan) -> None:
    """Print the steps as a table, and what they take beside what there is."""
    columns = {"step": "left", "does": "left", "seconds": "right", "disk GB": "right"}
    columns |= {"memory GB": "right", "figures": "left", "why": "left"}
    rows = [
        [
            *(step.step, step.does, about(step.cost.seconds, 0), about(step.cost.disk_gb, 1)),
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
    lines = {
        "Time": f"about {about(cost.seconds, 0)} s{besides}",
        "Disk": f"about {about(cost.disk_gb, 1)} GB, of {planned.free_disk_gb:.1f} free in "
        f"{planned.work}",
        "Memory": f"about {about(cost.memory_gb, 1)} GB, of {planned.available_memory_gb:.1f} "
        "available",
    }
    for name, text in lines.items():
        console.print(f"{name:11} {text}", soft_wrap=True, markup=False)
    if (cost.disk_gb or 0) > planned.free_disk_gb:
        console.print("The disk is too small: free space, or set SLM_WORK to another folder")
    if (cost.memory_gb or 0) > planned.available_memory_gb:
        console.print("The memory may not suffice")


def about(value: float | None, digits: int) -> str:
    """A figure, "" if it is not known."""
    return "" if value is None else f"{value:,.{digits}f}"


def main(config: Config) -> None:
    planned = plan(config)
    show(planned)
    note(result=asdict(planned))


if __name__ == "__main__":
    entry_point(main)
