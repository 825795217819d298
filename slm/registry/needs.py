"""What of the work folder registered versions were made from, and what live runs use.

Outcomes name what they hold: logged models by URI, contents and weights by digest. Versions have
the same in their source and tags, and so do runs in their parameters and tags.
"""

import re
import time
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from slm.registry.names import CONTENT, EVALUATED_WITH, SHA256
from slm.running.killed import children_of, search
from slm.running.tracking import stores_exist
from slm.running.work import records

DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
KEY = re.compile(r"\b[0-9a-f]{16}\b")  # of a folder in the work folder
# A run that still says so after that many days was killed.
RUNNING_DAYS = 7


def of_versions(work: Path) -> set[str]:
    """The words by which an outcome tells that a registered version was made from it.

    The registered models are those that outcomes of `register` name: Unity Catalog finds versions
    by name only, and without their tags.
    """
    made = [version for r in records(work / "register") for version in r["outcome"]["versions"]]
    if not made or not stores_exist():
        return set()
    client, words = MlflowClient(), set()
    for name in {version["name"] for version in made}:
        for found in mlflow.search_model_versions(filter_string=f"name = '{name}'"):
            words |= words_of(client.get_model_version(name, str(found.version)))
    return words


def words_of(version: ModelVersion) -> set[str]:
    """The URIs of its logged models, the digests of its content and its weights."""
    digests = DIGEST.findall(" ".join(version.tags.get(tag, "") for tag in (CONTENT, SHA256)))
    uris = {str(version.source), version.tags.get(EVALUATED_WITH, "")} - {""}
    return uris | set(digests)


def of_live_runs() -> set[str]:
    """The keys of the folders that runs use which have not ended, and those of all runs below."""
    if not stores_exist():
        return set()
    since = int((time.time() - RUNNING_DAYS * 86400) * 1000)
    running = f"attributes.status = 'RUNNING' and attributes.start_time > {since}"
    waiting, runs = search(running), {}
    while waiting:
        run = waiting.pop()
        if run.info.run_id not in runs:
            runs[run.info.run_id] = run
            waiting += children_of(run)
    told = (f"{run.data.tags} {run.data.params}" for run in runs.values())
    return {key for text in told for key in KEY.findall(text)}
