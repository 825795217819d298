"""What a training job logged to MLflow: a model of the transformers flavor, or a checkpoint folder.

An alias is resolved to its version. Whatever was logged is looked up at `model.tracking_uri` and
`model.registry_uri`, else where this project's own runs go; credentials are MLflow's own.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slm.config.model import Model
from slm.errors import InputError
from slm.redaction import redacted
from slm.running.tracking import absolute_uri, environment
from slm.sources.artifacts import Artifacts, explained
from slm.sources.remote import Found, Store

# MLflow's client tries a server that is away for minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
FORMS = (
    "models:/name/version",
    "models:/name@alias",
    "runs:/id/path",
    "mlflow-artifacts:/path",
)
RUN_ID = r"[0-9a-f]{32}"


@dataclass(frozen=True)
class Logged:
    """Where something that was logged lies: an artifact URI, and a folder or a file in it.

    `model_id` and `run_id` are "" if it is no logged model, or if no run is known.
    """

    location: str
    path: str
    pinned: str
    model_id: str = ""
    run_id: str = ""


def find(uri: str, model: Model) -> Found | None:
    """What lies at a URI of MLflow; None for other URIs."""
    scheme, _, rest = uri.partition(":/")
    if scheme not in LOOKUPS:
        return None
    import mlflow
    from mlflow import MlflowClient

    tracking = absolute_uri(model.tracking_uri or mlflow.get_tracking_uri())
    require_store(tracking, uri, "MLFLOW_TRACKING_URI, or model.tracking_uri,")
    other = model.registry_uri or model.tracking_uri
    registry = absolute_uri(other or mlflow.get_registry_uri())
    require_store(registry, uri, "MLFLOW_REGISTRY_URI, or model.registry_uri,")
    client = MlflowClient(tracking_uri=tracking, registry_uri=registry)
    with (
        explained(uri),
        environment({name: os.environ.get(name, value) for name, value in PATIENCE.items()}),
    ):
        logged = LOOKUPS[scheme](client, rest.strip("/"), uri, registry)
    # What MLflow logged as a model is not written to again.
    otherwise = logged.model_id or (logged.pinned if uri.startswith("models:") else "")
    stores = {"tracking_uri": tracking, "registry_uri": registry}
    store = Artifacts(logged.location, uri, otherwise, **stores)
    with explained(uri):
        training = training_of(client, logged, redacted(tracking))
    folder, file = logged.path, ""
    if folder.endswith(".gguf"):
        folder, _, file = folder.rpartition("/")
    folders: tuple[str, ...] = (folder,)
    base = ""
    if not file and "MLmodel" in (listed := store.files_in(folder)):
        folders, base = of_flavor(store, read_mlmodel(store, listed["MLmodel"]), folder, uri)
    return Found(store, folders, logged.pinned, file, training, base)


def require_store(store: str, uri: str, setting: str) -> None:
    """Raise if there is no such database: MLflow's client would make an empty one."""
    path = store.removeprefix("sqlite:///")
    if path != store and not Path(path).is_file():
        raise InputError(
            f"{uri} is looked up in {store}, which does not exist. Set {setting} to the store that "
            "the training job logged to."
        )


def version_or_model(client: Any, rest: str, uri: str, registry: str) -> Logged:
    """models:/name/version, models:/name@alias or models:/m-id, and a path in it or none."""
    if match := re.fullmatch(r"(m-[0-9a-f]+)(?:/(.*))?", rest):
        logged = client.get_logged_model(match[1])
        pinned = f"models:/{match[1]}" + (f"/{match[2]}" if match[2] else "")
        run_id = logged.source_run_id or ""
        return Logged(logged.artifact_location, match[2] or "", pinned, match[1], run_id)
    match = re.fullmatch(r"([^/@]+)(?:@([^/]+)|/(\d+))(?:/(.*))?", rest)
    if match is None:
        raise InputError(f"{uri} is none of {', '.join(FORMS[:2])}: its version is a number.")
    name, alias, number, path = match.groups()
    if alias:
        version = client.get_model_version_by_alias(name, alias)
    else:
        version = client.get_model_version(name, number)
    path = path or ""
    pinned = f"models:/{name}/{version.version}" + (f"/{path}" if path else "")
    model_id = version.model_id or ""
    if match := re.fullmatch(r"models:/(m-[0-9a-f]+)", str(version.source)):
        model_id = match[1]
    if registry.startswith(("databricks", "uc")):
        location = f"models:/{name}/{version.version}"
    else:
        location = client.get_model_version_download_uri(name, version.version)
    return Logged(location, path, pinned, model_id, version.run_id or "")


def of_run(client: Any, rest: str, uri: str, _: str) -> Logged:
    """runs:/id/path, among the run's artifacts or the models that it logged."""
    run_id, _, path = rest.partition("/")
    run = client.get_run(run_id)
    pinned = f"runs:/{run_id}/{path}"
    name, _, within = path.partition("/")
    own = Artifacts(run.info.artifact_uri, uri, tracking_uri=client.tracking_uri)
    if name and not own.repository.list_artifacts(name):
        query = f"name = '{name}' AND source_run_id = '{run_id}'"
        models = client.search_logged_models([run.info.experiment_id], filter_string=query)
        if models:  # newest first
            return Logged(models[0].artifact_location, within, pinned, models[0].model_id, run_id)
    return Logged(run.info.artifact_uri, path, pinned, run_id=run_id)


def of_server(client: Any, rest: str, uri: str, _: str) -> Logged:
    """mlflow-artifacts:/path, whose path names the run where MLflow made it."""
    run_id = next(iter(re.findall(RUN_ID, rest)), "")
    folder = re.sub(r"/[^/]+\.gguf$", "", uri)
    file = uri.removeprefix(folder).strip("/")
    return Logged(folder, file, uri, run_id=run_id)


LOOKUPS = {"models": version_or_model, "runs": of_run, "mlflow-artifacts": of_server}


def training_of(client: Any, logged: Logged, tracking: str) -> dict[str, str]:
    """The run that trained it, its experiment, the logged model, and the server that has them."""
    from mlflow.exceptions import MlflowException

    if not logged.run_id:
        return {}
    try:
        run = client.get_run(logged.run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # of another server, or deleted
            return {}
        raise
    known = {"run": logged.run_id, "experiment": run.info.experiment_id, "tracking": tracking}
    return known | ({"model": logged.model_id} if logged.model_id else {})


def read_mlmodel(store: Store, listed: Any) -> dict[str, Any]:
    return yaml.safe_load(store.read(listed)) or {}


def of_flavor(
    store: Store, mlmodel: dict[str, Any], folder: str, uri: str
) -> tuple[tuple[str, ...], str]:
    """The folders of a logged model that make a checkpoint or an adapter, and the adapter's base.

    MLflow keeps weights and tokenizer apart; the tokenizer's own folder is what it serves.
    """
    flavors = mlmodel.get("flavors", {})
    flavor = flavors.get("transformers")
    if flavor is None:
        found = (
            ", ".join(name for name in flavors if name != "python_function") or "python_function"
        )
        raise InputError(
            f"{uri} is of MLflow's flavor {found}; weights can be taken of the flavor "
            "transformers alone. Log the checkpoint with it, or as a folder of the run."
        )
    within = f"{folder}/" if folder else ""
    tokenizer = f"{within}components/tokenizer"
    base = flavor.get("source_model_name", "")
    revision = flavor.get("source_model_revision")
    at_hub = f"hf://{base}@{revision}" if base and revision else ""
    if adapter := flavor.get("peft_adaptor"):
        return (f"{within}{adapter}", tokenizer), at_hub
    if "model_binary" not in flavor:
        raise InputError(
            f"{uri} holds no weights: MLflow logged where they are. Write model.source="
            f"{at_hub or base}"
        )
    return (f"{within}{flavor['model_binary']}", tokenizer), ""
