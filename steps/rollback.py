"""Make the previous version champion again, and record why.

    mlflow run . -e rollback -P model=phi-3-mini-4k-instruct -P target=cuda-fp16 -P reason="slow"
    python -m steps.rollback model=phi-3-mini-4k-instruct target=cuda-fp16 reason="'slow, wrong'"

Each registered interface of the model and target goes back one step. The ousted version keeps the
reason as its tag `rolled_back`, and register does not promote it again. The checkpoint's registered
model, which other targets share as their reference, keeps its aliases.

Run again after a kill, it finishes what was begun: the plan stands as a tag of the first registered
model from before the first write until after the last.
"""

import json
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import mlflow
from mlflow import MlflowClient

from steps.command import entry_point
from steps.config import Config, Interface, Register
from steps.registry import (
    CHAMPION,
    PREVIOUS,
    ROLLED_BACK,
    SUCCEEDS,
    aliases_of,
    registered_name,
    turn,
)
from steps.step import log_parameters, mlflow_run

log = logging.getLogger("steps.rollback")

PLAN = "rollback"


@dataclass(frozen=True)
class Step:
    """Versions of a registered model: champion until now, from now on, and who is previous then."""

    name: str
    ousted: str
    restored: str
    previous: str


@dataclass(frozen=True)
class Rollback:
    """`reason` names when and who; `uri` is the first restored champion."""

    uri: str
    reason: str
    steps: list[Step]


def rollback(names: list[str], reason: str, holder: str) -> Rollback:
    """Go back one step, or finish an earlier run's. `holder` names this run among all that write.

    Raises ValueError where there is nothing to go back to, RuntimeError where the champion changed
    meanwhile: who asked for this did not see the new one.
    """
    client = MlflowClient()
    seen = {name: aliases_of(client, name).get(CHAMPION) for name in names}
    with turn(client, names, holder):
        plan = unfinished(client, names)
        if plan is None:
            for name, champion in seen.items():
                if (now := aliases_of(client, name).get(CHAMPION)) != champion:
                    raise RuntimeError(
                        f"{name}: version {now} became champion meanwhile, after {champion}. "
                        "Look at it, and roll back again if it has to go."
                    )
            plan = plan_of(client, names, reason)
            client.set_registered_model_tag(names[0], PLAN, json.dumps(asdict(plan)))
        for step in plan.steps:
            go_back(client, step, plan.reason)
    client.delete_registered_model_tag(names[0], PLAN)
    if plan.reason.split(" (")[0] != reason.split(" (")[0]:
        raise RuntimeError(
            f"finished an earlier rollback, because: {plan.reason}. Look at the champion, and roll "
            "back again if it has to go as well."
        )
    return plan


def registered_names(model: str, target: str, settings: Register) -> list[str]:
    """The registered models of a model and target, one for each interface that has one."""
    metadata = {"model": model, "provenance": {"target": target}}
    names = sorted(
        {registered_name({**metadata, "interface": i.value}, settings) for i in Interface}
    )
    if found := [name for name in names if aliases_of(MlflowClient(), name)]:
        return found
    raise ValueError(
        f"the registry has no champion of {' or '.join(names)}. Check model, target and "
        "register.name_template."
    )


def unfinished(client: MlflowClient, names: list[str]) -> Rollback | None:
    """The plan of a run that was killed, as far as no later champion made it void."""
    text = client.get_registered_model(names[0]).tags.get(PLAN)
    if text is None:
        return None
    plan = json.loads(text)
    steps = [Step(**step) for step in plan["steps"]]
    steps = [
        step
        for step in steps
        if aliases_of(client, step.name).get(CHAMPION, "") in (step.ousted, step.restored)
    ]
    if not steps:
        return None
    log.info("rollback: finishing the one that was begun: %s", plan["reason"])
    return Rollback(plan["uri"], plan["reason"], steps)


def plan_of(client: MlflowClient, names: list[str], reason: str) -> Rollback:
    """What to go back to, of each registered model."""
    steps = []
    for name in names:
        aliases = aliases_of(client, name)
        champion = aliases.get(CHAMPION, "")
        line = predecessors(client, name, champion, aliases.get(PREVIOUS, ""))
        if line:
            steps.append(Step(name, champion, line[0], line[1] if len(line) > 1 else ""))
    if not steps:
        raise ValueError(f"{' and '.join(names)} have no version to go back to.")
    for name in set(names) - {step.name for step in steps}:
        log.info("rollback: %s has no version to go back to, and stays as it is", name)
    return Rollback(f"models:/{steps[0].name}@{CHAMPION}", reason, steps)


def predecessors(client: MlflowClient, name: str, champion: str, previous: str) -> list[str]:
    """The previous version and those that it succeeded, newest first, without those rolled back."""
    there = {
        str(version.version)
        for version in mlflow.search_model_versions(filter_string=f"name = '{name}'")
    }
    line, walked = [], {champion}
    while previous in there - walked:
        tags = client.get_model_version(name, previous).tags
        if ROLLED_BACK not in tags:
            line.append(previous)
        walked.add(previous)
        previous = tags.get(SUCCEEDS, "")
    return line


def go_back(client: MlflowClient, step: Step, reason: str) -> None:
    """Move the aliases; every write may have been made before."""
    if step.ousted:  # somebody may have taken the alias from it
        client.set_model_version_tag(step.name, step.ousted, ROLLED_BACK, reason)
    client.set_registered_model_alias(step.name, CHAMPION, step.restored)
    if step.previous:
        client.set_registered_model_alias(step.name, PREVIOUS, step.previous)
    else:
        client.delete_registered_model_alias(step.name, PREVIOUS)
    log.info("rollback: %(name)s: version %(restored)s is champion again", asdict(step))


def main(config: Config) -> None:
    with mlflow_run("rollback") as run:
        log_parameters("register", config)
        names = registered_names(config.model.name, config.target.name, config.register)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        who = run.data.tags.get("mlflow.user", "")
        reason = f"{config.reason or 'no reason given'} ({now}, {who})"
        result = rollback(names, reason, run.info.run_id)
        mlflow.set_tags({"reason": result.reason, "restored": result.uri})
        mlflow.log_dict({"outcome": asdict(result)}, "result.json")


if __name__ == "__main__":
    entry_point(main)
