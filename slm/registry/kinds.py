"""What the kinds of registries hold, and what they let one do: asked before the first write."""

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slm.config.packaging import Register
from slm.errors import InputError, StepError, one_line
from slm.redaction import redacted
from slm.running.tracking import TEXT_LIMIT

# Characters of a tag's value: docs.databricks.com, "Apply tags to Unity Catalog securable objects".
UNITY_CATALOG_TAG_LIMIT = 1000


def is_unity_catalog() -> bool:
    """Whether the registry is Databricks' Unity Catalog, which keeps files of its own."""
    return mlflow.get_registry_uri().startswith("databricks-uc")


def tag_limit() -> int:
    """How many characters the value of a registered model's or a version's tag may have."""
    return UNITY_CATALOG_TAG_LIMIT if is_unity_catalog() else TEXT_LIMIT


def require_registry(settings: Register) -> None:
    """Raise InputError if the registry has no aliases, or names of which a part is not set."""
    uri = mlflow.get_registry_uri()
    if uri.partition(":")[0] in ("uc", "databricks"):
        kind = "open-source Unity Catalog" if uri.startswith("uc") else "the workspace's registry"
        raise InputError(
            f"the registry {redacted(uri)} is {kind}, where MLflow has no aliases, thus no "
            "champion. Set MLFLOW_REGISTRY_URI to databricks-uc, or to a tracking server."
        )
    if is_unity_catalog() and settings.catalog is None:
        raise InputError(
            f"the registry {uri} is Unity Catalog, where a name has three levels, and "
            "register.catalog is not set. Set register.catalog=<catalog>.<schema>."
        )


def require_rights(client: MlflowClient, names: list[str], absent: str) -> None:
    """Raise StepError if one may not write tags, or delete aliases, of one of the models.

    Nothing is written: what is deleted is a tag and an alias `absent`, which nobody has. A database
    has no rights to ask for. Who may register and not delete would leave a promotion half done.
    """
    if not mlflow.get_registry_uri().startswith(("http", "databricks")):
        return
    for name in names:
        for right, delete in (
            ("write tags", client.delete_registered_model_tag),
            ("delete aliases", client.delete_registered_model_alias),
        ):
            try:
                delete(name, absent)
            except MlflowException as error:
                if error.error_code == "PERMISSION_DENIED":
                    raise StepError(denied(f"{right} of {name}", error)) from error
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                    raise


def denied(action: str, error: MlflowException) -> str:
    """What one may not do, and which right allows it."""
    if action.startswith("create"):
        right = "the right to create registered models (in Unity Catalog: CREATE MODEL)"
    else:
        right = "the permission MANAGE on it (in Unity Catalog: to own it)"
    said = one_line(error)[:200]
    return f"you may not {action}; nothing was changed. Ask for {right}. The registry says: {said}"
