"""Log a checkpoint with MLflow's transformers flavor, as a chat model with OpenAI's schema.

python -m steps.log_transformers source=/data/checkpoint
mlflow models serve -m models:/m-… --env-manager local
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.models import Model

from slm.config import Config
from slm.config.packaging import Signing
from slm.digests import (
    Provenance,
    digest_of,
    read_provenance,
    require_files,
    require_model,
    size_mb,
)
from slm.planning import require_room_for
from slm.records import LoggedModel, LoggedModels
from slm.running.command import entry_point
from slm.running.lineage import link_training, training_tags
from slm.running.links import copies_as_links
from slm.running.run import run_step
from slm.running.tracking import gone, local_path, shown_tracking_uri
from slm.running.work import versions, work_folder
from slm.seal import Sealed, require_key_to_sign, signed_by
from slm_pyfunc.signatures import QUESTION

LIBRARIES = ("mlflow", "transformers", "torch", "accelerate")


def log_transformers(
    checkpoint: Path, provenance: Provenance, model_name: str, signing: Signing
) -> LoggedModels:
    """Log the checkpoint folder as it is: its weights are copied, never loaded."""
    from huggingface_hub import ModelCard

    requirements = [
        f"{package}=={version.split('+')[0]}" for package, version in versions(*LIBRARIES).items()
    ]
    model = LoggedModel(
        uri="",
        name=f"{model_name}-transformers",
        model=model_name,
        interface="chat",
        content=digest_of([provenance.identity, requirements]),
        provenance=provenance,
        size_mb=size_mb(checkpoint),
    )
    licence = provenance.licence or "unknown"
    with offline_hub(), named_checkpoint(checkpoint, model_name) as relative_path:
        logged = Model.log(
            artifact_path=None,  # deprecated, and still required
            name=model.logged_name,
            flavor=Sealed(mlflow.transformers, model, requirements, signing),
            flavor_name="mlflow.transformers",
            transformers_model=relative_path,
            validate_serving_input=False,  # that would load the weights
            task="llm/v1/chat",
            # The default of transformers' pipeline; a load may override only what was logged.
            model_config={"do_sample": True},
            input_example={"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16},
            model_card=ModelCard(f"---\nlicense: {licence}\n---\n# {model_name}\n"),
            metadata=model.metadata(),
            tags={"model": model_name, "interface": "chat", **training_tags(provenance)},
        )
    stored = model.stored_as(logged.model_uri)
    return LoggedModels(stored.uri, [stored], stored.size_mb)


@contextlib.contextmanager
def offline_hub() -> Iterator[None]:
    """Keep MLflow 3.17 from looking for a model card at the hub, under the name it was given."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def named_checkpoint(checkpoint: Path, name: str) -> Iterator[str]:
    """A working directory in which the checkpoint's relative path is the model's name.

    MLflow 3.17 answers with the path that it was given as `model`.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path(name).symlink_to(checkpoint, target_is_directory=True)
        yield name


def main(config: Config) -> LoggedModels:
    checkpoint = local_path(config.source, "source", "fetch")
    require_files(checkpoint, "config.json", made_by="fetch")
    provenance = read_provenance(checkpoint)
    require_model(provenance, config.model.name)
    require_key_to_sign(config.signing)

    def make(_: Path) -> LoggedModels:
        require_room_for("log_transformers", config, checkpoint)
        with copies_as_links(checkpoint, work_folder(config.paths.work)):
            return log_transformers(checkpoint, provenance, config.model.name, config.signing)

    return run_step(
        "log_transformers",
        config,
        LoggedModels,
        key={
            "checkpoint": provenance.identity,
            "model": config.model.name,
            "tracking": shown_tracking_uri(),
            "versions": versions(*LIBRARIES),
            "signing": signed_by(config.signing),
        },
        make=make,
        publish=lambda *_: link_training(provenance),
        stale=gone,
    )


if __name__ == "__main__":
    entry_point(main)
