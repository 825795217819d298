"""What a run would do, what that takes, and whether this machine has it.

`plan` shows it, and `preflight` stops a run that does not fit before anything large moves.
"""

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.utils.file_utils import local_file_uri_to_path

from slm.config import Config, Preflight
from slm.digests import size_mb
from slm.errors import InfrastructureError, UserError
from slm.records import Checkpoint
from slm.registry.kinds import require_registry
from slm.running.chain import SHARED, Link, kept, of_first_target, of_target, pipeline
from slm.running.costs import Cost, Size, cost_of
from slm.running.memory import available_memory_gb
from slm.running.run import Ask
from slm.running.tracking import calling_folder, stores_exist
from slm.running.work import NotKept, records, work_folder
from slm.seal import require_key_to_sign
from slm.sources.adapter import sources_of
from slm.sources.hub import Hub
from slm.sources.resolve import Source
from slm.sources.size import size_at, size_told
from slm.sources.weights import read_tensors

log = logging.getLogger("slm.planning")

REUSED, RUNS, MAY_RUN = "reused", "runs", "may run"
# The share by which figures may be too high: sizes follow from the weights, memory is rough. A run
# is stopped only if it does not fit even so.
MARGINS = {"disk": 0.1, "memory": 0.3}
CURES = {
    "disk": "Free space there, or set SLM_WORK (or what the folder is named by) to another disk",
    "memory": "Take a machine with more memory",
}


@dataclass(frozen=True)
class Planned:
    """What would become of a step, and why; `basis` says where the figures of its cost are from."""

    step: str
    does: str
    why: str
    cost: Cost
    basis: str = ""


@dataclass(frozen=True)
class Need:
    """What is taken while a step runs, beside what there is, in GB.

    `of` is disk (with what the steps before it left `where` this is) or memory.
    """

    step: str
    of: str
    where: str
    gb: float
    free_gb: float
    alone: bool = False  # without what steps before it leave

    @property
    def lacks(self) -> bool:
        """Whether there is too little even if the figure is as much too high as it may be."""
        return self.gb * (1 - MARGINS[self.of]) > self.free_gb

    def words(self) -> str:
        place = f" in {self.where}" if self.where else ""
        place += ", with what the steps before it leave" if place and not self.alone else ""
        figure = f"{self.step} needs about {self.gb:.1f} GB of {self.of}{place}"
        return f"{figure}, and {self.free_gb:.1f} GB are there"


@dataclass(frozen=True)
class Plan:
    """All steps; what they take together if all that may run do; and what this machine has."""

    steps: list[Planned]
    cost: Cost
    work: str
    free_disk_gb: float
    available_memory_gb: float
    needs: list[Need] = field(default_factory=list)

    def greatest(self) -> list[Need]:
        """Of memory, and of each disk, the step that takes the most."""
        of: dict[tuple[str, str], Need] = {}
        for need in self.needs:
            key = need.of, need.where
            of[key] = max(of.get(key, need), need, key=lambda n: n.gb)
        return list(of.values())


def plan(config: Config, outcomes: Mapping[str, Any] | None = None) -> Plan:
    """Ask every step in turn, but for those whose `outcomes` are there.

    InputError where a step would refuse what it is given.
    """
    require_registry(config.register)
    require_key_to_sign(config.signing)
    config, known = of_first_target(config), dict(outcomes or {})
    links = [link for link in pipeline(config) if link.name not in known]
    found = [(link, *ask(link, of_target(config, link.target), known)) for link in links]
    size = size_of(config, known.get("fetch"))
    places = places_of(config)
    steps = []
    for link, does, why in found:
        own = of_target(config, link.target)
        costs = costing(link.step, own, size, places) if does != REUSED else (Cost(),)
        steps.append(Planned(link.name, does, why, *costs))
    running = [planned for planned in steps if planned.does != REUSED]
    return Plan(
        steps,
        together([planned.cost for planned in running]),
        str(places["disk_gb"]),
        free_gb(places["disk_gb"]),
        available_memory_gb(),
        list(needs_of(running, places)),
    )


def require_room(config: Config, outcomes: Mapping[str, Any]) -> None:
    """Hold what a run is yet to take against what this machine has, as `preflight` says.

    Raises InfrastructureError, if it is `stop`, at the first step that certainly runs and does not
    fit, and warns of what may not.
    """
    if config.preflight is Preflight.off:
        return
    try:
        planned = plan(config, outcomes)
    except UserError:  # the step that meets it says so
        return
    certain = needs_of([step for step in planned.steps if step.does == RUNS], places_of(config))
    hold(certain, planned.greatest(), config.preflight)


def require_room_for(
    step: str, config: Config, checkpoint: Path | None = None, source: Source | None = None
) -> None:
    """As `require_room`, for a step that is about to run on its own.

    The size is that of its `checkpoint`, or as its `source` says, which is not asked for again.
    """
    if config.preflight is Preflight.off:
        return
    try:
        size = size_in(checkpoint, str(checkpoint)) if checkpoint else size_of(config, None, source)
        places = places_of(config)
        planned = Planned(step, RUNS, "", *costing(step, config, size, places, source))
    except UserError:  # the step that meets it says so
        return
    needs = [replace(need, alone=True) for need in needs_of([planned], places)]
    hold(needs, needs, config.preflight)


def hold(certain: Iterable[Need], all_needs: Iterable[Need], preflight: Preflight) -> None:
    """Raise InfrastructureError if something lacks for certain; warn of what may not suffice."""
    lacking = next((need for need in certain if need.lacks), None)
    if lacking and preflight is Preflight.stop:
        raise InfrastructureError(
            f"preflight: {lacking.words()}. {CURES[lacking.of]}, or go on in spite of it with "
            "preflight=warn."
        )
    for need in all_needs:
        if need.gb > need.free_gb:
            log.warning("preflight: %s: it may not suffice", need.words())


def ask(link: Link, config: Config, outcomes: dict[str, Any]) -> tuple[str, str]:
    """What a step would do, and why; its outcome goes to the others if it is kept."""
    waits_for = [step for step in link.needs if step not in outcomes]
    if waits_for:
        if not made_before(link.step, config):
            return RUNS, f"never made of {' for '.join(of_step(link.step, config).values())}"
        return MAY_RUN, f"if {' or '.join(waits_for)} ends otherwise"
    try:
        outcomes[link.name] = kept(link.step, config, link.inputs(outcomes), Ask.look)
    except NotKept as why:
        return RUNS, str(why)
    return REUSED, outcomes[link.name].uri


def of_step(step: str, config: Config) -> dict[str, str]:
    """What tells outcomes of a step from those of other models, and of other targets if it may."""
    target = {} if step in SHARED else {"target": config.target.name}
    return {"model": config.model.name, **target}


def made_before(step: str, config: Config) -> list[dict[str, Any]]:
    """The records of the step's outcomes that are kept of this model, and target."""
    own, found = of_step(step, config), records(work_folder(config.paths.work) / step)
    return [record for record in found if own.items() <= record.get("of", {}).items()]


def costing(
    step: str,
    config: Config,
    size: Size | None,
    places: Mapping[str, Path],
    source: Source | None = None,
) -> tuple[Cost, str]:
    """What a step takes: as it took last time, else by the size of the model."""
    cost = Cost() if size is None else cost_of(step, size, config)
    if same_disk(places.get("store_gb"), places["disk_gb"]):
        cost = replace(cost, store_gb=0.0)  # hard links
    if cost.cache_gb:
        links = same_disk(places["cache_gb"], places["disk_gb"]) and not (size and size.gguf_gb)
        source = source or sources_of(config.model)[1]
        there = isinstance(source, Hub) and source.cached() is not None
        cost = replace(
            cost,
            disk_gb=0.0 if links else cost.disk_gb,
            cache_gb=0.0 if there else cost.cache_gb,
        )
    last = max(made_before(step, config), key=lambda record: record["made"], default=None)
    if last is None:
        return cost, "" if size is None else "by size"
    return replace(cost, memory_gb=last["peak_rss_mb"] / 1e3, seconds=last["made_s"]), (
        "as last time"
    )


def size_in(folder: Path, source: str) -> Size:
    """The size of a checkpoint; `source` names it in errors."""
    weights = sum(tensor.size for tensor in read_tensors(folder, source).values())
    return Size(weights / 1e9, size_mb(folder) / 1e3)


def size_of(
    config: Config, checkpoint: Checkpoint | None, source: Source | None = None
) -> Size | None:
    """The model's size: of the checkpoint, else as conf/ or its source says; None if none does."""
    if checkpoint is not None:
        return size_in(Path(checkpoint.uri), checkpoint.source)
    if config.model.parameters:
        return size_told(config.model.parameters / 1e9, config.model.source or "")
    return size_at(source or sources_of(config.model)[1])


def places_of(config: Config) -> dict[str, Path]:
    """The folders in which a Cost's figures are taken; a store that is elsewhere has none."""
    from huggingface_hub import constants

    places = {"disk_gb": work_folder(config.paths.work), "cache_gb": Path(constants.HF_HUB_CACHE)}
    run = mlflow.active_run()
    if run is not None:
        location = run.info.artifact_uri
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = mlflow.get_experiment_by_name(name) if stores_exist() else None
        location = experiment.artifact_location if experiment else "mlruns"
    if urlsplit(location).scheme in ("", "file"):
        places["store_gb"] = calling_folder() / local_file_uri_to_path(location)
    return places


def needs_of(steps: list[Planned], places: Mapping[str, Path]) -> Iterator[Need]:
    """What each step takes of memory and of disks; what it keeps is taken when the next one runs.

    Folders on one disk are one place, the first of them.
    """
    disks: dict[int, Path] = {}
    for place in places.values():
        disks.setdefault(device(place), place)
    kept_gb: dict[int, float] = defaultdict(float)
    memory_gb = available_memory_gb()
    for step in steps:
        taken: dict[int, float] = defaultdict(float)
        for name, place in places.items():
            gb = getattr(step.cost, name) or 0.0
            kept_gb[device(place)] += gb
            taken[device(place)] += gb
        taken[device(places["disk_gb"])] += step.cost.scratch_gb
        for disk, gb in taken.items():
            if gb:
                peak = kept_gb[disk]
                peak += step.cost.scratch_gb if disk == device(places["disk_gb"]) else 0.0
                yield Need(step.step, "disk", str(disks[disk]), peak, free_gb(disks[disk]))
        if step.cost.memory_gb:
            yield Need(step.step, "memory", "", step.cost.memory_gb, memory_gb)


def standing(path: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def device(path: Path) -> int:
    return standing(path).stat().st_dev


def same_disk(one: Path | None, other: Path) -> bool:
    return one is not None and device(one) == device(other)


def free_gb(path: Path) -> float:
    return shutil.disk_usage(standing(path)).free / 1e9


def together(costs: list[Cost]) -> Cost:
    """Steps one after the other: disk and time add up, memory is that of the largest."""
    figures = {
        f.name: [value for cost in costs if (value := getattr(cost, f.name)) is not None]
        for f in fields(Cost)
    }
    return Cost(
        **{
            name: max(values, default=0.0) if name in ("memory_gb", "scratch_gb") else sum(values)
            for name, values in figures.items()
        }
    )
