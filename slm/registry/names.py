"""The names in the registry: registered models, aliases, and every tag that this project writes."""

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from slm.config.packaging import Register
from slm.records import LoggedModel
from slm.registry.kinds import require_registry
from slm.running import lineage
from slm.running.tracking import TEXT_LIMIT

# Aliases of a registered model. The champion serves; a challenger passed its evaluation and is not
# champion (yet); previous is the version that the champion took the alias from.
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"

# Tags of a version: where it came from.
CONTENT = "content"  # the digest of weights, code, environment and settings
INTERFACE = "interface"
TARGET = "target"
SOURCE = "source"
REVISION = "revision"
LICENCE = "licence"
TRAINING_RUN = lineage.TRAINING_RUN  # the run that trained the weights
VERSIONS = "versions"  # of the libraries that made it, as JSON
SHA256 = "sha256"  # of its weights, as JSON
LOGGED_MODEL = "logged_model"  # the id of the logged model that it was made of
SIGNED_BY = "signed_by"  # the SHA-256 of the public key's file, if its signature was verified
# How it was judged.
VERDICT = "verdict"
VERDICT_REASONS = "verdict_reasons"
EVALUATED_WITH = "evaluated_with"  # the URI of the checkpoint's logged model
METRICS = "metrics"  # for readers; what decides is read from the logged model
CONDITIONS = "conditions"  # under which these were measured
# What became of it.
CHOSEN = "chosen"  # why `choose` took it among other targets
ANSWERED = "answered"  # it was loaded by its URI, and answered
SUCCEEDS = "succeeds"  # the version that it took the alias champion from, or none
ROLLED_BACK = "rolled_back"  # why it must not become champion again

# Tags of a registered model: a run that has its turn (and the run's id), a rollback under way.
PROMOTING = "promoting_"
PLAN = "rollback"


def registered_name(model: LoggedModel, settings: Register) -> str:
    """The name that a logged model's versions are registered under."""
    return name_of(model.model, model.target, model.interface, settings)


def name_of(model: str, target: str, interface: str, settings: Register) -> str:
    """The registered name of a model's interface for a target; of the checkpoint without one.

    Unity Catalog separates with dots, so the model's own become underscores there. Raises
    InputError if the registry can have no such name, or no champion.
    """
    require_registry(settings)
    template = settings.name_template if target else settings.reference_name_template
    name = template.format(model=model, target=target, interface=interface)
    return f"{settings.catalog}.{name.replace('.', '_')}" if settings.catalog else name


def cut(text: str, limit: int = TEXT_LIMIT) -> str:
    """As much of a text as a tag or a description of so many characters holds."""
    text = text.strip()  # Unity Catalog refuses a tag with a space at either end
    return text if len(text) <= limit else text[: limit - 1] + "…"


def version_uri(version: ModelVersion) -> str:
    return f"models:/{version.name}/{version.version}"


def logged_model_of(version: ModelVersion) -> str:
    """The id of the logged model that a version was made of.

    MLflow's client for Unity Catalog may put the place of its files into `source`.
    """
    return version.tags.get(LOGGED_MODEL) or str(version.source).removeprefix("models:/")


def registered_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model of that name; None if there is none."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """The aliases of a registered model and their versions; none if it does not exist."""
    model = registered_model(client, name)
    return {a: str(version) for a, version in model.aliases.items()} if model else {}


def version_with_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has the alias; None if none has, or if there is no such model."""
    version = aliases_of(client, name).get(alias)
    return client.get_model_version(name, version) if version else None
