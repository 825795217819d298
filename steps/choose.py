"""Package a model for a ladder of targets, register the best that fits a budget, show the rest.

    mlflow run . --env-manager local -e choose -P budget="size_mb<=110 decode_tokens_per_s>=60"
    python -m steps.choose ladder=cpu objective=smallest --budget "perplexity_ratio<=1.1"

Targets are tried in the ladder's order. One that cannot be exported, or fails its gates, does not
keep the others from being tried. Every outcome is kept: interrupted, it goes on where it was.
"""

import logging
from dataclasses import dataclass, replace

import mlflow
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from mlflow import MlflowClient

from slm.children import Chain, overrides_for_children
from slm.config import Config
from slm.config.model import Gate
from slm.config.target import Objective
from slm.errors import (
    InputError,
    StepError,
    UnreachableError,
    UserError,
    VerdictError,
    is_away,
    told_of,
)
from slm.evaluation.choice import Tried, best, budget_of, nearest, why
from slm.evaluation.comparison import Comparison, Row, publish, row_of
from slm.evaluation.gates import gates_of
from slm.evaluation.summary import next_lines, show
from slm.records import Registration
from slm.registry.kinds import require_registry, tag_limit
from slm.registry.names import CHOSEN, cut
from slm.running.chain import SHARED, given_overrides
from slm.running.command import entry_point, heed_another_source, typed
from slm.running.summary import job, note, worst
from slm.running.tracking import mlflow_run
from slm.running.work import work_folder
from slm.seal import require_key_to_sign

log = logging.getLogger("slm.choose")


@dataclass(frozen=True)
class Rung:
    """A target of the ladder, and how it ended; `tried` if it was measured."""

    chain: Chain
    row: Row
    exit_code: int = 0
    tried: Tried | None = None

    @property
    def size_mb(self) -> float:
        """Of the ONNX folder, which has to be there."""
        return self.chain.outcomes["export_onnx"].size_mb


def climb(chains: list[Chain], budget: dict[str, Gate], objective: Objective) -> list[Rung]:
    """Try each target in turn, as far as the objective needs it.

    Raises what fails for all of them: the error of a shared step, or of a server that is away.
    """
    rungs: list[Rung] = []
    for number, chain in enumerate(chains, 1):
        fitting = [rung for rung in rungs if rung.tried and rung.tried.fits]
        if fitting and objective is Objective.cheapest:
            words = f"not tried: {fitting[0].row.name} fits, and comes first on the ladder"
            rungs.append(Rung(chain, Row(chain.target, "", {}, obstacles=[words])))
            continue
        log.info("choose: target %d of %d: %s", number, len(chains), chain.target)
        decides = objective is Objective.smallest
        smallest = min(fitting, key=lambda r: r.size_mb, default=None) if decides else None
        rungs.append(tried(chain, budget, smallest))
    return rungs


def tried(chain: Chain, budget: dict[str, Gate], smallest: Rung | None) -> Rung:
    """Export, log and measure a target; do not measure what is no smaller than `smallest`."""
    obstacles: list[str] = []
    with job() as told:
        told.label = told.target = chain.target
        told.model = chain.config.model.name
        try:
            work = work_folder(chain.config.paths.work)
            with mlflow_run("choose", work, chain.target) as run:
                told.run_id = run.info.run_id
                for link in chain.links[:-1]:
                    if obstacles := too_large(chain, smallest):
                        break
                    chain.run(link)
                mlflow.set_tag("verdict", told.verdict)
                mlflow.log_metrics(told.metrics)
        except UserError as error:
            failed = next(link.step for link in chain.links[:-1] if link.step not in chain.children)
            told.error, told.exit_code = told_of(error)
            # What all targets share fails for all of them.
            if failed in SHARED or isinstance(error, UnreachableError) or is_away(told.error):
                raise
    row = row_of(told)
    if obstacles or told.error:
        return Rung(chain, replace(row, obstacles=obstacles or row.obstacles), told.exit_code)
    found = Tried.of(chain.target, chain.outcomes["evaluate"], budget)
    return Rung(chain, replace(row, obstacles=found.obstacles), tried=found)


def too_large(chain: Chain, smallest: Rung | None) -> list[str]:
    """In words, that an exported target is no smaller than one that fits."""
    if smallest is None or "export_onnx" not in chain.children:
        return []
    size = chain.outcomes["export_onnx"].size_mb
    if size < smallest.size_mb:
        return []
    than = f"the {smallest.size_mb:.1f} of {smallest.row.name}, which fits"
    return [f"not measured: its {size:.1f} MB are no less than {than}"]


def chains_of(config: Config) -> list[Chain]:
    """A chain of steps for each target of the ladder, all composed before the first begins."""
    choices, given = HydraConfig.get().runtime.choices, given_overrides("target")
    if any(override.startswith("target=") for override in HydraConfig.get().overrides.task):
        raise InputError("choose takes no target; give ladder.targets=[…], or another ladder.")
    if config.log_pyfunc.targets:
        raise InputError("choose packages each target by itself; leave out log_pyfunc.targets.")
    chains = []
    for target in config.ladder.targets:
        own = typed(compose("config", [*given, f"target={target}"]))
        heed_another_source(own, given, choices["model"])
        gates_of(own)  # raises if one bounds no metric
        chains.append(Chain(own, choices["model"], target, overrides_for_children()))
    return chains


def registered(winner: Rung, reason: str) -> Registration:
    """Register it, and write on its versions why it was chosen."""
    winner.chain.run(winner.chain.links[-1])
    registration = winner.chain.outcomes["register"]
    for made in registration.versions[: len(winner.chain.outcomes["evaluate"].candidates)]:
        MlflowClient().set_model_version_tag(
            made.name, made.version, CHOSEN, cut(reason, tag_limit())
        )
    return registration


def not_chosen(rungs: list[Rung], words: str) -> StepError:
    """The error that says what stands in the way, of the target that came nearest."""
    measured = [rung.tried for rung in rungs if rung.tried]
    if any(one.evaluation.verdict != "not_evaluated" for one in measured):
        one = nearest(measured)
        return VerdictError(f"no {words}; nearest is {one.name}: {'; '.join(one.obstacles)}.")
    told = "; ".join(f"{rung.row.name}: {' '.join(rung.row.obstacles)}" for rung in rungs)
    error = StepError(f"no {words}, for none was measured: {told}")
    error.exit_code = worst(rung.exit_code for rung in rungs) or StepError.exit_code
    return error


def main(config: Config) -> None:
    require_registry(config.register)
    require_key_to_sign(config.signing)
    budget = budget_of(config.budget, config.evaluate)
    chains, objective = chains_of(config), config.objective
    work, ladder = work_folder(config.paths.work), HydraConfig.get().runtime.choices["ladder"]
    of = f"target of ladder {ladder} ({len(chains)}) passes its gates"
    of += f" and keeps the budget {' '.join(budget)}" if budget else ""
    with mlflow_run("choose", work):
        mlflow.log_params(
            {
                "model.name": config.model.name,
                "ladder.targets": ", ".join(config.ladder.targets),
                "choose.budget": " ".join(budget) or "none",
                "choose.objective": objective.value,
            }
        )
        rungs = climb(chains, budget, objective)
        measured = [rung.tried for rung in rungs if rung.tried]
        chosen = best(measured, objective)
        reason = why(chosen, measured, objective) if chosen else str(not_chosen(rungs, of))
        name = chosen.name if chosen else ""
        title = ", ".join(filter(None, [name, reason]))
        rows = [rung.row for rung in rungs]
        page = publish(
            Comparison(f"{config.model.name}: {title}", rows, name, budget), work / "choose"
        )
        note(result={"chosen": name, "why": reason, "page": str(page)})
        if chosen is None:
            raise not_chosen(rungs, of)
        winner = next(rung for rung in rungs if rung.tried is chosen)
        asked = f"{objective.value} on ladder {ladder}, budget {' '.join(budget) or 'none'}"
        registration = registered(winner, f"{reason} ({asked})")
        note(target=chosen.name)
        mlflow.set_tags({"chosen": chosen.name, "why": reason, "registered": registration.uri})
    steps = [
        [step, f"{child.duration_s:.1f}", child.outcome.uri]
        for step, child in winner.chain.children.items()
    ]
    lines = next_lines(config.paths.work, chosen.evaluation.report, registration.uri)
    show(steps, chosen.evaluation, registration, {"Chosen": f"{chosen.name}: {reason}", **lines})


if __name__ == "__main__":
    entry_point(main)
