"""The run that trained the weights: how what is packaged of them leads back to it in MLflow."""

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput

from slm.digests import Provenance
from slm.running.tracking import shown_tracking_uri

TRAINING_RUN = "training_run"  # the tag of runs, logged models and versions that names it


def is_here(provenance: Provenance) -> bool:
    """Whether the training run is in the store that this process writes to."""
    return provenance.origin.training.get("tracking") == shown_tracking_uri()


def training_run(provenance: Provenance) -> str:
    """The training run's id, "" if none is known or if another store has it."""
    return provenance.origin.training.get("run", "") if is_here(provenance) else ""


def training_tags(provenance: Provenance) -> dict[str, str]:
    """The training run as a tag, with its store if that is another one; none if none is known."""
    training = provenance.origin.training
    if not training:
        return {}
    where = "" if is_here(provenance) else f" in {training['tracking']}"
    return {TRAINING_RUN: f"runs:/{training['run']}{where}"}


def training_link(provenance: Provenance) -> str:
    """The training run as a link of Markdown, as MLflow's pages follow it; "" if none is known."""
    training = provenance.origin.training
    if not training:
        return ""
    here, tracking = is_here(provenance), training["tracking"]
    page = f"#/experiments/{training['experiment']}/runs/{training['run']}"
    if here or tracking.startswith("http"):
        return f"[{training['run']}]({page if here else f'{tracking}/{page}'})"
    return f"{training['run']} in {tracking}"


def link_training(provenance: Provenance) -> None:
    """Name the training run on the active run, and the model that it logged as the run's input."""
    if tags := training_tags(provenance):
        mlflow.set_tags(tags)
    model = provenance.origin.training.get("model")
    run = mlflow.active_run()
    if run and model and is_here(provenance):
        MlflowClient().log_inputs(run.info.run_id, models=[LoggedModelInput(model)])
