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
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import mlflow
from mlflow import MlflowClient

from slm.config import Config
from slm.config.packaging import Interface, Register, Signing
from slm.errors import InputError, StepError
from slm.records import from_json
from slm.registry.kinds import require_rights, tag_limit
from slm.registry.names import (
    CHAMPION,
    PLAN,
    PREVIOUS,
    ROLLED_BACK,
    SUCCEEDS,
    aliases_of,
    name_of,
)
from slm.registry.turns import turn
from slm.running.command import entry_point
from slm.running.summary import note
from slm.running.tracking import log_parameters, mlflow_run
from slm.running.work import work_folder
from slm.seal import require_signed

log = logging.getLogger("slm.rollback")


@dataclass(frozen=True)
class Move:
    """Versions of a registered model: champion until now, champion then, and previous then."""

    name: str
    ousted: str
    restored: str
    previous: str


@dataclass(frozen=True)
class Request:
    """Why to roll back, when (ISO 8601) and by whom it was asked for."""

    reason: str
    when: str = ""
    who: str = ""


@dataclass(frozen=True)
class Rollback:
    """A Request, and the moves that it leads to; `uri` is the first restored champion."""

    uri: str
    reason: str
    steps: list[Move]
    when: str = ""
    who: str = ""

    @property
    def tag(self) -> str:
        """What an ousted version says of it."""
        return f"{self.reason} ({self.when}, {self.who})" if self.when else self.reason


def rollback(
    names: list[str], request: Request, holder: str, signing: Signing | None = None
) -> Rollback:
    """Go back one step, or finish an earlier run's. `holder` names this run among all that write.

    Raises InputError if there is nothing to go back to, StepError if a right is missing, or if the
    champion changed meanwhile: whoever asked for this did not see the new one. StepError too,
    before anything is written, if a version to go back to is not signed as `signing` asks.
    """
    client = MlflowClient()
    require_rights(client, names, holder)
    seen = {name: aliases_of(client, name).get(CHAMPION) for name in names}
    with turn(client, names, holder):
        plan = unfinished(client, names)
        if plan is None:
            for name, champion in seen.items():
                if (now := aliases_of(client, name).get(CHAMPION)) != champion:
                    raise StepError(
                        f"{name}: version {now} became champion meanwhile, after {champion}. "
                        "Look at it, and roll back again if it has to go."
                    )
            plan = plan_of(client, names, request)
            restored = [f"models:/{step.name}/{step.restored}" for step in plan.steps]
            require_signed(restored, signing or Signing())
            client.set_registered_model_tag(names[0], PLAN, tag_of(plan))
        for step in plan.steps:
            go_back(client, step, plan.tag)
    client.delete_registered_model_tag(names[0], PLAN)
    if plan.reason != request.reason:
        raise StepError(
            f"finished an earlier rollback, because: {plan.tag}. Look at the champion, and roll "
            "back again if it has to go as well."
        )
    return plan


def registered_names(model: str, target: str, settings: Register) -> list[str]:
    """The registered models of a model and target, one for each interface that has one."""
    names = sorted({name_of(model, target, i.value, settings) for i in Interface})
    if found := [name for name in names if aliases_of(MlflowClient(), name)]:
        return found
    raise InputError(
        f"the registry has no champion of {' or '.join(names)}. Check model, target and "
        "register.name_template."
    )


def unfinished(client: MlflowClient, names: list[str]) -> Rollback | None:
    """The plan of a run that was killed, as far as no later champion made it void."""
    text = client.get_registered_model(names[0]).tags.get(PLAN)
    if text is None:
        return None
    plan = from_json(Rollback, json.loads(text))
    steps = [
        step
        for step in plan.steps
        if aliases_of(client, step.name).get(CHAMPION, "") in (step.ousted, step.restored)
    ]
    if not steps:
        return None
    log.info("rollback: finishing the one that was begun: %s", plan.tag)
    return replace(plan, steps=steps)


def plan_of(client: MlflowClient, names: list[str], request: Request) -> Rollback:
    """What to go back to, of each registered model."""
    steps = []
    for name in names:
        aliases = aliases_of(client, name)
        champion = aliases.get(CHAMPION, "")
        line = predecessors(client, name, champion, aliases.get(PREVIOUS, ""))
        if line:
            steps.append(Move(name, champion, line[0], line[1] if len(line) > 1 else ""))
    if not steps:
        raise InputError(f"{' and '.join(names)} have no version to go back to.")
    for name in set(names) - {step.name for step in steps}:
        log.info("rollback: %s has no version to go back to, and stays as it is", name)
    return Rollback(f"models:/{steps[0].name}@{CHAMPION}", steps=steps, **asdict(request))


def tag_of(plan: Rollback) -> str:
    """The plan as a tag; InputError if the reason is too long for that."""
    text = json.dumps(asdict(plan))
    if (excess := len(text) - tag_limit()) > 0:
        raise InputError(
            f"reason is {excess} characters too long for a tag of the registry. Say it in less."
        )
    return text


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


def go_back(client: MlflowClient, step: Move, tag: str) -> None:
    """Move the aliases; every write may have been made before."""
    if step.ousted:  # somebody may have taken the alias from it
        client.set_model_version_tag(step.name, step.ousted, ROLLED_BACK, tag)
    client.set_registered_model_alias(step.name, CHAMPION, step.restored)
    if step.previous:
        client.set_registered_model_alias(step.name, PREVIOUS, step.previous)
    else:
        client.delete_registered_model_alias(step.name, PREVIOUS)
    log.info("rollback: %(name)s: version %(restored)s is champion again", asdict(step))


def main(config: Config) -> None:
    with mlflow_run("rollback", work_folder(config.paths.work)) as run:
        log_parameters("register", config)
        names = registered_names(config.model.name, config.target_name, config.register)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        who = run.data.tags.get("mlflow.user", "")
        request = Request((config.reason or "").strip() or "no reason given", now, who)
        result = rollback(names, request, run.info.run_id, config.signing)
        mlflow.set_tags({"reason": result.tag, "restored": result.uri})
        mlflow.log_dict({"outcome": asdict(result)}, "result.json")
        note(result=asdict(result))


if __name__ == "__main__":
    entry_point(main)
