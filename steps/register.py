"""Put what passed its evaluation into the Model Registry, and make it champion if it is no worse.

    python -m steps.register source=work/evaluate/<key>
    python -m steps.register source=runs:/<run id of evaluate>/result.json

Every logged model becomes a version: the interfaces of the ONNX model, and the checkpoint that it
was held against. Those that passed become `challenger`; once they were loaded from the registry by
their URIs and answered, they become `champion` if there is none, or if the measured one, the lead,
is no worse than it within `register.margins`. The other versions follow the lead.

Every write can be the last one before a kill: run again, it ends as if there had been none.
"""

import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from steps.command import entry_point
from steps.config import ROOT, Config, Register
from steps.promotion import drop_challenger, nominate, settle
from steps.provenance import digest_of
from steps.registry import ANSWERED, CHALLENGER, CHAMPION, aliases_of, registered_name, turn
from steps.step import local_path, logged_model_exists, run_step

log = logging.getLogger("steps.register")

CODE = ("register.py", "promotion.py", "registry.py", "gates.py", "ask.py")
# What MLflow's stores hold of a tag or description, in characters.
LIMIT = 5000
# The tags that a version of the same content takes from a later evaluation with the same verdict.
REFRESHED = ("metrics", "conditions", "verdict_reasons", "evaluated_with")


@dataclass(frozen=True)
class Registration:
    """Versions, as dicts of name, version and alias ("": none), the lead first; `uri` is its own.

    `promoted` says that the lead is champion, `reasons` why not.
    """

    uri: str
    verdict: str
    versions: list[dict[str, str]]
    promoted: bool
    reasons: list[str]


@dataclass(frozen=True)
class Entry:
    """A logged model, and what its version is to say."""

    uri: str
    name: str
    tags: dict[str, str]
    description: str


def register(evaluation: dict[str, Any], settings: Register, holder: str) -> Registration:
    """Make a version of each model, unless there is one; promote them, or say why not.

    `holder` names this run among all that want to write. Raises ValueError after a failed verdict,
    RuntimeError where a version does not answer.
    """
    verdict, reasons = evaluation["verdict"], evaluation["reasons"]
    if verdict == "failed" and not settings.failed:
        raise ValueError(f"not registered, the evaluation failed: {'; '.join(reasons)}.")
    client = MlflowClient()
    models = [*evaluation["candidates"], evaluation["reference"]]
    entries = [entry_of(uri, evaluation, settings) for uri in models]
    names = make_registered_models(client, entries)
    passed = verdict == "passed"
    with turn(client, names, holder):
        versions = [version_of(client, entry) for entry in entries]
        for version in versions if passed else []:
            nominate(client, version)
    if passed:
        try:
            prove(client, versions, evaluation)
        except RuntimeError:
            with turn(client, names, holder):
                for version in versions:
                    drop_challenger(client, version)
            raise
        with turn(client, names, holder):
            reasons = settle(client, versions, evaluation, settings.margins)
    return registration(client, versions, verdict, reasons)


def entry_of(uri: str, evaluation: dict[str, Any], settings: Register) -> Entry:
    """What to register of a logged model: its name, tags and description."""
    metadata = mlflow.models.get_model_info(uri).metadata or {}
    tags = provenance_tags(metadata, evaluation)
    description = evaluation["model_card"]
    if "target" not in tags:
        description = (
            f"The checkpoint of {metadata['model']} as it is, served by MLflow's transformers "
            "flavor: the reference that its ONNX models are held against."
        )
    return Entry(uri, registered_name(metadata, settings), tags, description[:LIMIT])


def provenance_tags(metadata: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, str]:
    """What a version says of itself: where it came from, what made it, how it was judged."""
    provenance = metadata["provenance"]
    checkpoint = provenance.get("checkpoint", provenance)
    onnx = "target" in provenance
    tags = {
        "content": metadata["content"],
        "interface": metadata["interface"],
        "target": provenance.get("target", ""),
        "source": checkpoint["source"],
        "revision": checkpoint.get("revision", ""),
        "licence": checkpoint.get("licence", ""),
        # A verdict is about the ONNX model; the checkpoint serves many as their reference.
        "verdict": evaluation["verdict"] if onnx else "",
        "verdict_reasons": "; ".join(evaluation["reasons"]) if onnx else "",
        "evaluated_with": evaluation["reference"] if onnx else "",
        "metrics": metrics_tag(evaluation["candidate_metrics" if onnx else "reference_metrics"]),
        "conditions": evaluation["conditions"],
        "versions": json.dumps(provenance.get("versions", {})),
        "sha256": json.dumps(
            {n: d for n, d in provenance["files"].items() if n.endswith((".data", ".safetensors"))}
        ),
    }
    return {key: value[:LIMIT] for key, value in tags.items() if value}


def metrics_tag(metrics: dict[str, float]) -> str:
    """Metrics as JSON, details left out where they are too many for a tag."""
    details_last = sorted(metrics, key=lambda name: re.search("_ci95_|_at_|/", name) is not None)
    finite = {k: float(f"{metrics[k]:.6g}") for k in details_last if math.isfinite(metrics[k])}
    while len(text := json.dumps(finite)) > LIMIT:
        finite.popitem()
    return text


def make_registered_models(client: MlflowClient, entries: list[Entry]) -> list[str]:
    """Create the registered models that are missing; return their names, one for each entry."""
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(
            f"register.name_template and reference_name_template give {', '.join(names)}: the "
            "models need names of their own. Put {interface} into the template."
        )
    for name in names:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
                raise
    return names


def version_of(client: MlflowClient, entry: Entry) -> ModelVersion:
    """The version of this content, and of this verdict if it is the ONNX model's; made if need be.

    Unity Catalog finds versions by name only, and without their tags.
    """
    same = ("content", "verdict") if "target" in entry.tags else ("content",)
    found = mlflow.search_model_versions(filter_string=f"name = '{entry.name}'")
    for number in sorted(int(version.version) for version in found if version.status == "READY"):
        version = client.get_model_version(entry.name, str(number))
        logged_model = str(version.source).removeprefix("models:/")
        if all(version.tags.get(tag) == entry.tags[tag] for tag in same) and logged_model_exists(
            logged_model
        ):
            log.info("register: %s version %d holds this content already", entry.name, number)
            refresh(client, version, entry)
            break
    else:
        version = client.create_model_version(
            entry.name,
            entry.uri,
            tags=entry.tags,
            description=entry.description,
            model_id=entry.uri.removeprefix("models:/"),
        )
        log.info("register: made %s version %s", entry.name, version.version)
    if version.source == entry.uri:
        link(client, version)
    return version


def refresh(client: MlflowClient, version: ModelVersion, entry: Entry) -> None:
    """Bring what the last evaluation says onto a version; write only what differs."""
    for tag in REFRESHED:
        if (value := entry.tags.get(tag, "")) != version.tags.get(tag, ""):
            client.set_model_version_tag(version.name, version.version, tag, value)
    if (version.description or "") != entry.description:
        client.update_model_version(version.name, version.version, entry.description)


def link(client: MlflowClient, version: ModelVersion) -> None:
    """Let the logged model's page show the version, as mlflow.register_model does."""
    model = mlflow.get_logged_model(str(version.source).removeprefix("models:/"))
    linked = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    this = {"name": version.name, "version": str(version.version)}
    if this not in [{**one, "version": str(one["version"])} for one in linked]:
        linked.append(this)
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(linked)})


def prove(client: MlflowClient, versions: list[ModelVersion], evaluation: dict[str, Any]) -> None:
    """Load versions by their URIs in one fresh process, and ask them; tag those that answer.

    Those that answered after the same measurement are not asked again, nor is the champion.
    """
    measurement = digest_of([evaluation["candidate_metrics"], evaluation["conditions"]])[:16]
    unproven = [
        version
        for version in versions
        if version.tags.get(ANSWERED) != measurement
        and aliases_of(client, version.name).get(CHAMPION) != str(version.version)
    ]
    if not unproven:
        return
    uris = [f"models:/{version.name}/{version.version}" for version in unproven]
    log.info("register: loading %s in a fresh process", ", ".join(uris))
    command = [sys.executable, str(ROOT / "steps" / "ask.py"), "--with-torch", *uris]
    with tempfile.TemporaryDirectory() as scratch:
        own = {
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
            "TMPDIR": scratch,  # where MLflow downloads to, and leaves it
        }
        process = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    if process.returncode:
        complaint = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise RuntimeError(f"registered but not promoted: {complaint}")
    for version in unproven:
        client.set_model_version_tag(version.name, version.version, ANSWERED, measurement)


def registration(
    client: MlflowClient, versions: list[ModelVersion], verdict: str, reasons: list[str]
) -> Registration:
    """The outcome, with the aliases as they are now."""
    made = []
    for version in versions:
        aliases = aliases_of(client, version.name) if verdict == "passed" else {}
        held = [a for a in (CHAMPION, CHALLENGER) if aliases.get(a) == str(version.version)]
        alias = held[0] if held else ""
        made.append({"name": version.name, "version": str(version.version), "alias": alias})
    lead = made[0]
    states = {CHAMPION: "is champion", CHALLENGER: "stays challenger", "": "gets no alias"}
    words = "; ".join([f"version {lead['version']} {states[lead['alias']]}", *reasons])
    log.info("register: %s %s", lead["name"], words.replace(";", ":", 1))
    promoted = lead["alias"] == CHAMPION
    ending = f"@{CHAMPION}" if promoted else f"/{lead['version']}"
    return Registration(f"models:/{lead['name']}{ending}", verdict, made, promoted, reasons)


def is_registered(registration: Registration) -> bool:
    """Whether the registry still is as the outcome says.

    What kept a passed one from becoming champion may be gone, and asking costs little.
    """
    if registration.verdict == "passed" and not registration.promoted:
        return False
    client = MlflowClient()
    try:
        for made in registration.versions:
            client.get_model_version(made["name"], made["version"])
            alias = made["alias"]
            if alias and aliases_of(client, made["name"]).get(alias) != made["version"]:
                log.info("register: alias %(alias)s of %(name)s was moved", made)
                return False
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def read_evaluation(path: Path) -> dict[str, Any]:
    """What evaluate left: its folder, or its result.json."""
    path = path / "result.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: evaluate did not finish. Run it again.")
    fields = ["candidates", "reference", "verdict", "reasons", "gates", "conditions", "model_card"]
    fields += ["candidate_metrics", "reference_metrics", "champion", "champion_metrics"]
    try:
        evaluation = json.loads(path.read_text())["outcome"]
        return {field: evaluation[field] for field in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what evaluate ends with. Pass its uri as source."
        ) from error


def main(config: Config) -> Registration:
    evaluation = read_evaluation(local_path(config.source, "source", "evaluate"))

    def work(_: Path) -> Registration:
        run = mlflow.active_run()
        assert run is not None
        return register(evaluation, config.register, run.info.run_id)

    return run_step(
        "register",
        config,
        Registration,
        key={
            "evaluation": evaluation,
            "register": asdict(config.register),
            "registry": mlflow.get_registry_uri(),
        },
        code=[ROOT / "steps" / name for name in CODE],
        work=work,
        still_there=is_registered,
    )


if __name__ == "__main__":
    entry_point(main)
