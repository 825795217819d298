"""Which of a model's versions is challenger, champion and previous.

Called inside a turn (slm/registry/turns.py). Every write can be the last one before a kill: called
again, these functions end as if there had been no kill.
"""

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from slm.config.model import Baseline, Gate
from slm.evaluation.gates import judge
from slm.records import Evaluation
from slm.registry.names import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ROLLED_BACK,
    SUCCEEDS,
    TARGET,
    aliases_of,
    version_uri,
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
    evaluation: Evaluation,
    margins: dict[str, Gate],
) -> list[str]:
    """Promote the versions, the lead last; or return the reasons not to.

    If the lead is champion already, a version that follows it may still lack the alias: it was
    registered later, or its promotion was killed. A follower that has since lost the alias does not
    get it back.
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
        if TARGET in version.tags or was_left_behind(client, version):
            promote(client, version)
    return []


def was_left_behind(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether a version has yet to be promoted: never champion, or its promotion was cut short."""
    champion = aliases_of(client, version.name).get(CHAMPION, "none")
    succeeds = version.tags.get(SUCCEEDS, champion)
    return ROLLED_BACK not in version.tags and succeeds == champion


def objections(
    lead: ModelVersion,
    champion: ModelVersion | None,
    evaluation: Evaluation,
    margins: dict[str, Gate],
) -> list[str]:
    """What keeps the lead from becoming champion, in words."""
    if why := lead.tags.get(ROLLED_BACK):
        return [f"it was rolled back: {why}. Delete its tag {ROLLED_BACK} to allow it again"]
    if champion is None:
        return []
    if version_uri(champion) != evaluation.champion:
        return [
            f"version {champion.version} became champion since it was evaluated; evaluate it again"
        ]
    baselines = {Baseline.champion: evaluation.champion_metrics}
    judged = judge(margins, evaluation.candidate_metrics, baselines)
    return [margin.words() for margin in judged if not margin.passed]


def promote(client: MlflowClient, version: ModelVersion) -> None:
    """Make a version champion, and the champion so far `previous`; do only what is still to do."""
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
