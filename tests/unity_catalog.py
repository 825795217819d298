"""Unity Catalog's registry of models: MLflow's own store, behind the limits Databricks documents.

docs.databricks.com: "Apply tags to Unity Catalog securable objects", "Manage model lifecycle in
Unity Catalog".
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Blueprint, request
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag, RegisteredModelTag
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

from tests.refusals import asked, refuse

TAG_VALUE, TAG_KEY, TAGS, DESCRIPTION, NAME = 1000, 255, 50, 65536, 255
TAG_KEY_FORBIDDEN, NAME_FORBIDDEN = r"[.,\-=/:]|^\s|\s$", r"[\s/\x00-\x1f]"


class Catalog:
    """The models, and what MLflow's `databricks-uc` client may ask of them."""

    def __init__(self, folder: Path) -> None:
        self.store = SqlAlchemyStore(f"sqlite:///{folder / 'catalog.db'}")
        self.lock = threading.Lock()  # one request at a time, as SQLite has it
        self.pending: set[tuple[str, str]] = set()  # versions whose files are not all there
        self.sources: dict[tuple[str, str], tuple[str, str]] = {}  # and ids of logged models
        self.files_api = True  # else clients send files to the cloud's storage themselves

    def name(self, name: str) -> str:
        """A name of three levels, in lower case as Unity Catalog keeps it."""
        parts = name.split(".")
        if len(parts) != 3:
            refuse("INVALID_PARAMETER_VALUE", f"{name}: specify all three levels of the name.")
        if not all(parts) or len(parts[2]) > NAME or re.search(NAME_FORBIDDEN, name):
            refuse("INVALID_PARAMETER_VALUE", f"Invalid model name: {name}")
        return name.lower()

    def check_tag(self, key: str, value: str, tags: dict[str, str]) -> None:
        """Refuse what an object with these tags cannot hold."""
        if not 0 < len(key) <= TAG_KEY or re.search(TAG_KEY_FORBIDDEN, key):
            refuse("INVALID_PARAMETER_VALUE", f"Invalid tag key: {key}")
        if len(value) > TAG_VALUE or value != value.strip():
            refuse("INVALID_PARAMETER_VALUE", f"Invalid value of tag {key}: {len(value)} long")
        if len({*tags, key}) > TAGS:
            refuse("RESOURCE_LIMIT_EXCEEDED", f"more than {TAGS} tags")

    def model(self, name: str) -> dict[str, Any]:
        model = self.store.get_registered_model(name)
        aliases = [{"alias": a, "version": str(v)} for a, v in model.aliases.items()]
        return {"registered_model": {"name": name, "tags": pairs(model.tags), "aliases": aliases}}

    def create_model(self, name: str, description: str = "") -> dict[str, Any]:
        self.store.create_registered_model(name, description=description)
        return self.model(name)

    def tag_model(self, name: str, key: str, value: str) -> None:
        self.check_tag(key, value, self.store.get_registered_model(name).tags)
        self.store.set_registered_model_tag(name, RegisteredModelTag(key, value))

    def shown(self, version: ModelVersion) -> dict[str, Any]:
        """A version as a search finds it: without its tags and aliases."""
        key = version.name, str(version.version)
        source, model_id = self.sources[key]
        return {
            "name": version.name,
            "version": str(version.version),
            "source": source,
            "model_id": model_id,
            "run_id": version.run_id or "",
            "description": version.description or "",
            "status": "PENDING_REGISTRATION" if key in self.pending else "READY",
            "storage_location": "s3://bucket/models",
        }

    def version(self, name: str, version: str) -> dict[str, Any]:
        found = self.store.get_model_version(name, version)
        aliases = [{"alias": alias, "version": version} for alias in found.aliases]
        own = {"tags": pairs(found.tags), "aliases": aliases}
        return {"model_version": {**self.shown(found), **own}}

    def version_of(self, name: str, alias: str) -> dict[str, Any]:
        version = self.store.get_model_version_by_alias(name, alias).version
        return self.version(name, str(version))

    def create_version(
        self,
        name: str,
        source: str,
        tags: list[dict[str, str]] = (),  # type: ignore[assignment]
        description: str = "",
        model_id: str = "",
        run_id: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        for tag in tags:
            self.check_tag(tag["key"], tag["value"], {tag["key"]: tag["value"] for tag in tags})
        if len(description) > DESCRIPTION:
            refuse("INVALID_PARAMETER_VALUE", f"description: {len(description)} long")
        kept = [ModelVersionTag(**tag) for tag in tags]
        made = self.store.create_model_version(
            name, "dbfs:/", run_id, kept, description=description
        )
        key = name, str(made.version)
        self.pending.add(key)
        self.sources[key] = source, model_id
        return self.version(*key)

    def credentials(self, **_: str) -> dict[str, Any]:
        """Those of a bucket: enough for the client to look for the cloud's own library."""
        keys = {"access_key_id": "a", "secret_access_key": "b", "session_token": "c"}
        return {"credentials": {"aws_temp_credentials": keys}}

    def finalize(self, name: str, version: str) -> dict[str, Any]:
        self.pending.discard((name, version))
        return self.version(name, version)

    def update_version(self, name: str, version: str, description: str = "") -> dict[str, Any]:
        self.store.update_model_version(name, version, description)
        return self.version(name, version)

    def tag_version(self, name: str, version: str, key: str, value: str) -> None:
        self.check_tag(key, value, self.store.get_model_version(name, version).tags)
        self.store.set_model_version_tag(name, version, ModelVersionTag(key, value))

    def search_versions(self, filter: str, **_: str) -> dict[str, Any]:
        if not (match := re.fullmatch(r"\s*name\s*=\s*'([^']+)'\s*", filter)):
            refuse("INVALID_PARAMETER_VALUE", f"unsupported filter: {filter}")
        found = self.store.search_model_versions(f"name = '{self.name(match[1])}'")
        return {"model_versions": [self.shown(version) for version in found]}


def pairs(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def unity_catalog(catalog: Catalog) -> Blueprint:
    """/api/2.0/mlflow/unity-catalog."""
    routes = Blueprint("unity_catalog", __name__, url_prefix="/api/2.0/mlflow/unity-catalog")
    store = catalog.store
    operations: dict[str, Callable[..., Any]] = {
        "POST registered-models/create": catalog.create_model,
        "GET registered-models/get": catalog.model,
        "POST registered-models/set-tag": catalog.tag_model,
        "DELETE registered-models/delete-tag": store.delete_registered_model_tag,
        "POST registered-models/alias": store.set_registered_model_alias,
        "GET registered-models/alias": catalog.version_of,
        "DELETE registered-models/alias": store.delete_registered_model_alias,
        "POST model-versions/create": catalog.create_version,
        "POST model-versions/generate-temporary-credentials": catalog.credentials,
        "POST model-versions/finalize": catalog.finalize,
        "GET model-versions/get": catalog.version,
        "GET model-versions/search": catalog.search_versions,
        "PATCH model-versions/update": catalog.update_version,
        "POST model-versions/set-tag": catalog.tag_version,
        "DELETE model-versions/delete-tag": store.delete_model_version_tag,
        "DELETE model-versions/delete": store.delete_model_version,
        "POST model-versions/emit-lineage": lambda **_: None,
    }

    @routes.get("/registered-models:is-databricks-sdk-models-artifact-repository-enabled")
    def files_api() -> dict[str, bool]:
        return {"is_databricks_sdk_models_artifact_repository_enabled": catalog.files_api}

    @routes.route("/<path:path>", methods=["GET", "POST", "PATCH", "DELETE"])
    def answer(path: str) -> dict[str, Any]:
        if (operation := operations.get(f"{request.method} {path}")) is None:
            refuse("ENDPOINT_NOT_FOUND", f"the stand-in has no {request.method} {path}")
        given = asked()
        if "name" in given:
            given["name"] = catalog.name(given["name"])
        with catalog.lock:
            return operation(**given) or {}

    return routes


def aliases(catalog: Catalog) -> Blueprint:
    """/api/2.1/unity-catalog, as the SDK asks it: which version an alias means."""
    routes = Blueprint("aliases", __name__, url_prefix="/api/2.1/unity-catalog/models")

    @routes.get("/<name>/aliases/<alias>")
    def version_of(name: str, alias: str) -> dict[str, Any]:
        found = catalog.store.get_model_version_by_alias(catalog.name(name), alias)
        names = dict(
            zip(("catalog_name", "schema_name", "model_name"), name.split("."), strict=True)
        )
        return {**names, "version": int(found.version)}

    return routes
