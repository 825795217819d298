"""Versions of registered models: what they say of themselves, made once, and proven."""

import json
import logging
import math
import tempfile
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from slm.config.packaging import Register
from slm.digests import digest_of
from slm.errors import InputError, StepError, is_away, one_line
from slm.evaluation.metrics import base_name, is_of_harness
from slm.proof import prove
from slm.records import Evaluation, LoggedModel
from slm.registry import names
from slm.registry.kinds import denied, is_unity_catalog, require_rights, tag_limit
from slm.registry.names import (
    aliases_of,
    cut,
    logged_model_of,
    registered_model,
    registered_name,
    version_uri,
)
from slm.running.lineage import training_link, training_run, training_tags
from slm.running.tracking import environment, logged_model_exists, store_variables
from slm_pyfunc.verify import PUBLIC_KEY

log = logging.getLogger("slm.registry")

# The tags that a version of the same content takes from a later evaluation with the same verdict.
REFRESHED = (names.METRICS, names.CONDITIONS, names.VERDICT_REASONS, names.EVALUATED_WITH)


@dataclass(frozen=True)
class Entry:
    """A logged model to register: its registered name, and what the version is to say."""

    model: LoggedModel
    name: str
    tags: dict[str, str]
    description: str


def entry_of(
    model: LoggedModel, evaluation: Evaluation, settings: Register, key: str = ""
) -> Entry:
    """What to register of a logged model; `key` is the digest of the key that it is signed with."""
    if model.is_onnx:
        judged, description = onnx_tags(model, evaluation), evaluation.model_card
    else:
        judged = {names.METRICS: metrics_tag(evaluation.reference_metrics)}
        description = (
            f"The checkpoint of {model.model} as it is, served by MLflow's transformers flavor: "
            "the reference that its ONNX models are held against."
        )
    if run := training_link(model.provenance):
        description = f"Trained by the run {run}.\n\n{description}"
    tags = provenance_tags(model) | judged | {names.CONDITIONS: evaluation.conditions}
    tags[names.SIGNED_BY] = key
    tags = {key: cut(value, tag_limit()) for key, value in tags.items() if value}
    return Entry(model, registered_name(model, settings), tags, cut(description))


def provenance_tags(model: LoggedModel) -> dict[str, str]:
    """Where a model came from, and what made it."""
    provenance, origin = model.provenance, model.provenance.origin
    weights = {n: d for n, d in provenance.files.items() if n.endswith((".data", ".safetensors"))}
    return {
        names.CONTENT: model.content,
        names.INTERFACE: model.interface,
        names.TARGET: model.target,
        names.SOURCE: provenance.described_source,
        names.REVISION: origin.revision,
        names.LICENCE: origin.licence,
        names.VERSIONS: json.dumps(provenance.versions),
        names.SHA256: json.dumps(weights),
        names.LOGGED_MODEL: model.model_id,
        **training_tags(model.provenance),
    }


def onnx_tags(model: LoggedModel, evaluation: Evaluation) -> dict[str, str]:
    """How an ONNX model was judged. The checkpoint has no verdict: it serves many as reference."""
    return {
        names.VERDICT: evaluation.verdict,
        names.VERDICT_REASONS: "; ".join(evaluation.reasons),
        names.EVALUATED_WITH: evaluation.reference,
        names.METRICS: metrics_tag(evaluation.candidate_metrics),
    }


def metrics_tag(metrics: dict[str, float]) -> str:
    """Metrics as JSON, for readers; details are left out if they are too many for a tag."""
    details_last = sorted(metrics, key=lambda name: base_name(name) != name or is_of_harness(name))
    finite = {k: float(f"{metrics[k]:.6g}") for k in details_last if math.isfinite(metrics[k])}
    while len(text := json.dumps(finite)) > tag_limit():
        finite.popitem()
    return text


def make_registered_models(client: MlflowClient, entries: list[Entry], holder: str) -> list[str]:
    """Create the registered models that are missing; return their names, one for each entry.

    `holder` names this run. Raises StepError, before anything is written, if a right is missing.
    """
    registered = [entry.name for entry in entries]
    if len(set(registered)) < len(registered):
        raise InputError(
            f"register.name_template and reference_name_template give {', '.join(registered)}: the "
            "models need names of their own. Put {interface} into the template."
        )
    missing = [name for name in registered if registered_model(client, name) is None]
    require_rights(client, [name for name in registered if name not in missing], holder)
    for name in missing:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code == "PERMISSION_DENIED":
                raise StepError(denied(f"create {name}", error)) from error
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"):
                raise
    return registered


def version_of(client: MlflowClient, entry: Entry) -> ModelVersion:
    """The version of this content, and of this verdict if it is the ONNX model's; made if need be.

    A signed model is not taken for an unsigned one, or for one of another key. Unity Catalog finds
    versions by name only, and without their tags. It has files of its own; in other registries, a
    version is as good as its logged model.
    """
    same = [names.CONTENT, names.VERDICT] if entry.model.is_onnx else [names.CONTENT]
    same += [names.SIGNED_BY] if names.SIGNED_BY in entry.tags else []
    found = mlflow.search_model_versions(filter_string=f"name = '{entry.name}'")
    for number in sorted(int(version.version) for version in found if version.status == "READY"):
        version = client.get_model_version(entry.name, str(number))
        if all(version.tags.get(tag) == entry.tags[tag] for tag in same) and (
            is_unity_catalog() or logged_model_exists(logged_model_of(version))
        ):
            log.info("register: %s version %d holds this content already", entry.name, number)
            refresh(client, version, entry)
            break
    else:
        version = make_version(client, entry)
        log.info("register: made %s version %s", entry.name, version.version)
    if logged_model_of(version) == entry.model.model_id:
        link(client, version)
    return version


def make_version(client: MlflowClient, entry: Entry) -> ModelVersion:
    """Make a version; in Unity Catalog from a copy of the logged model's files.

    Its source run, as MLflow's page of it shows, is the one that trained the weights, if that is
    known; the logged model's is the one that packaged them.

    MLflow 3.17 uploads to Unity Catalog from the logged model's own folder if that lies on this
    machine: it writes into the folder, and deletes it if its place is a file: URI. Waits for a
    public way to say where a copy lies. Raises StepError if the client of the cloud's storage is
    missing; the version then stays pending, and a later run passes it over.
    """
    says: dict[str, Any] = {
        "name": entry.name,
        "source": entry.model.uri,
        "tags": entry.tags,
        "description": entry.description,
        "model_id": entry.model.model_id,
        "run_id": training_run(entry.model.provenance) or None,
    }
    if not is_unity_catalog():
        return created_once(client, says)
    with tempfile.TemporaryDirectory() as scratch:
        copy = mlflow.artifacts.download_artifacts(artifact_uri=entry.model.uri, dst_path=scratch)
        try:
            return client._create_model_version(**says, local_model_path=copy)
        except MlflowException as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            raise StepError(
                f"the files of {entry.name} cannot be sent to Unity Catalog's storage: "
                f"{one_line(error.__cause__)}. Install 'mlflow[databricks]=={mlflow.__version__}', "
                "and run it again."
            ) from error


def created_once(client: MlflowClient, says: dict[str, Any]) -> ModelVersion:
    """Create a version, though the registry's reply may be lost on the way.

    MLflow's client would send the request again, and the registry make a second version. Called in
    a turn: no other run makes versions meanwhile.
    """
    query = f"name = '{says['name']}'"
    before = {v.version for v in mlflow.search_model_versions(filter_string=query)}
    for last in (False, True):
        try:
            with environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}):
                return client.create_model_version(**says)
        except MlflowException as error:
            if last or not is_away(one_line(error)):
                raise
            log.info("register: no reply of the registry: looking whether the version is there")
        for version in mlflow.search_model_versions(filter_string=query):  # with patience
            if version.version not in before and version.tags == says["tags"]:
                return version
    raise AssertionError


def refresh(client: MlflowClient, version: ModelVersion, entry: Entry) -> None:
    """Bring what the last evaluation says onto a version; write only what differs."""
    for tag in REFRESHED:
        if (value := entry.tags.get(tag, "")) != version.tags.get(tag, ""):
            client.set_model_version_tag(version.name, version.version, tag, value)
    if (version.description or "") != entry.description:
        client.update_model_version(version.name, version.version, entry.description)


def link(client: MlflowClient, version: ModelVersion) -> None:
    """Let the logged model's page show the version, as mlflow.register_model does."""
    model = mlflow.get_logged_model(logged_model_of(version))
    linked = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    this = {"name": version.name, "version": str(version.version)}
    if this not in [{**one, "version": str(one["version"])} for one in linked]:
        linked.append(this)
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(linked)})


def prove_versions(
    client: MlflowClient,
    versions: list[ModelVersion],
    evaluation: Evaluation,
    public_key: str | None = None,
) -> None:
    """Load versions by their URIs in one fresh process, and ask them; tag those that answer.

    With a public key, the ONNX models verify themselves there.

    Those that answered after the same measurement are not asked again, nor is the champion. Raises
    StepError if one does not answer.
    """
    measurement = digest_of([evaluation.candidate_metrics, evaluation.conditions])[:16]
    unproven = [
        version
        for version in versions
        if version.tags.get(names.ANSWERED) != measurement
        and aliases_of(client, version.name).get(names.CHAMPION) != str(version.version)
    ]
    if not unproven:
        return
    uris = [version_uri(version) for version in unproven]
    log.info("register: loading %s in a fresh process", ", ".join(uris))
    with tempfile.TemporaryDirectory() as scratch:
        # MLflow downloads to TMPDIR, and leaves it there.
        own = {"TMPDIR": scratch, PUBLIC_KEY: public_key or ""}
        complaint = prove(uris, environment={**store_variables(), **own})
    if complaint:
        raise StepError(f"registered but not promoted: {complaint}")
    for version in unproven:
        client.set_model_version_tag(version.name, version.version, names.ANSWERED, measurement)
