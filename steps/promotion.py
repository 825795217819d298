"""Who of a model's versions is challenger, champion and previous; for register.

Called in one's turn (steps/registry.py). Every write can be the last one before a kill: called
again, these functions end as if there had been none.
"""

from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from steps.config import Baseline, Gate
from steps.gates import explain, judge
from steps.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ROLLED_BACK,
    SUCCEEDS,
    aliases_of,
    version_with_alias,
)


def nominate(client: MlflowClient, version: ModelVersion) -> None:
    """Make a version challenger, unless it was champion before, or a newer one is challenger."""
    aliases = aliases_of(client, version.name)
    was_champion = {SUCCEEDS, ROLLED_BACK} & version.tags.keys()
    is_champion = aliases.get(CHAMPION) == str(version.version)
    newest = int(aliases.get(CHALLENGER, 0)) < int(version.version)
    if newest and not is_champion and not was_champion:
        client.set_registered_model_alias(version.name, CHALLENGER, version.version)


def settle(
    client: MlflowClient,
    versions: list[ModelVersion],
    evaluation: dict[str, Any],
    margins: dict[str, Gate],
) -> list[str]:
    """Promote the versions, the lead last, unless there are reasons not to, which it returns.

    Where the lead is champion already, what follows it may still lack the alias: it was registered
    later, or its promotion was killed. A follower that lost the alias since does not get it back.
    """
    versions = [client.get_model_version(v.name, v.version) for v in versions]
    lead, followers = versions[0], versions[1:]
    champion = version_with_alias(client, lead.name, CHAMPION)
    if champion is not None and champion.version == lead.version:
        followers = [version for version in followers if was_left_behind(client, version)]
    elif reasons := objections(lead, champion, evaluation, margins):
        for version in versions:
            nominate(client, version)
        return reasons
    for version in [*followers, lead]:
        # Other targets share the checkpoint's model: a later one stays where it is.
        if "target" in version.tags or SUCCEEDS not in version.tags:
            promote(client, version)
    return []


def was_left_behind(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether a version was never champion, or began to succeed who still is."""
    champion = aliases_of(client, version.name).get(CHAMPION, "none")
    succeeds = version.tags.get(SUCCEEDS, champion)
    return ROLLED_BACK not in version.tags and succeeds == champion


def objections(
    lead: ModelVersion,
    champion: ModelVersion | None,
    evaluation: dict[str, Any],
    margins: dict[str, Gate],
) -> list[str]:
    """What keeps the lead from becoming champion, in words."""
    if why := lead.tags.get(ROLLED_BACK):
        return [f"it was rolled back: {why}. Delete its tag {ROLLED_BACK} to allow it again"]
    if champion is None:
        return []
    if f"models:/{champion.name}/{champion.version}" != evaluation["champion"]:
        return [
            f"version {champion.version} became champion since it was evaluated; evaluate it again"
        ]
    baselines = {Baseline.champion: evaluation["champion_metrics"]}
    results = judge(margins, evaluation["candidate_metrics"], baselines)
    return [explain(result) for result in results if not result["passed"]]


def promote(client: MlflowClient, version: ModelVersion) -> None:
    """Make a version champion, and the champion `previous`; whatever was done is not done again."""
    name, number = version.name, str(version.version)
    champion = aliases_of(client, name).get(CHAMPION)
    if champion != number:
        client.set_model_version_tag(name, number, SUCCEEDS, champion or "none")
        if champion:
            client.set_registered_model_alias(name, PREVIOUS, champion)
        client.set_registered_model_alias(name, CHAMPION, number)
    drop_challenger(client, version)


def drop_challenger(client: MlflowClient, version: ModelVersion) -> None:
    """Take the alias challenger from the version, if it has it."""
    if aliases_of(client, version.name).get(CHALLENGER) == str(version.version):
        client.delete_registered_model_alias(version.name, CHALLENGER)
