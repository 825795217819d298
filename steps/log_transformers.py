"""Log a checkpoint with MLflow's transformers flavor, as a chat model with OpenAI's schema.

python -m steps.log_transformers source=/data/checkpoint
mlflow models serve -m models:/m-… --env-manager local
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow

from steps.command import entry_point
from steps.config import Config
from steps.provenance import digest_of, read_provenance, require_files, size_mb
from steps.step import local_path, logged_model_exists, run_step, versions

LIBRARIES = ("mlflow", "transformers", "torch", "accelerate")


@dataclass(frozen=True)
class LoggedTransformers:
    """A logged model; `content` is the digest of its weights and environment."""

    uri: str
    model_id: str
    name: str
    content: str
    size_mb: float


def log_transformers(
    checkpoint: Path, provenance: dict[str, Any], config: Config
) -> LoggedTransformers:
    """Log the checkpoint folder as it is: its weights are copied, never loaded."""
    # MLflow looks for a model card at the hub, under whatever name it was given.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import ModelCard

    requirements = [
        f"{package}=={version.split('+')[0]}" for package, version in versions(*LIBRARIES).items()
    ]
    content = digest_of([provenance, requirements])
    name = f"{config.model.name}-transformers"
    licence = provenance.get("licence", "unknown")
    with named_checkpoint(checkpoint, config.model.name) as relative_path:
        logged = mlflow.transformers.log_model(
            transformers_model=relative_path,
            name=name.replace(".", "_"),  # MLflow forbids dots here, not in the registry
            task="llm/v1/chat",
            # The default of transformers' pipeline; a load may override only what was logged.
            model_config={"do_sample": True},
            pip_requirements=requirements,
            input_example={
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "max_tokens": 16,
            },
            model_card=ModelCard(f"---\nlicense: {licence}\n---\n# {config.model.name}\n"),
            metadata={
                "name": name,
                "model": config.model.name,
                "interface": "chat",
                "content": content,
                "provenance": provenance,
            },
            tags={"model": config.model.name, "interface": "chat"},
        )
    return LoggedTransformers(logged.model_uri, logged.model_id, name, content, size_mb(checkpoint))


@contextlib.contextmanager
def named_checkpoint(checkpoint: Path, name: str) -> Iterator[str]:
    """A working directory in which the checkpoint's relative path is the model's name.

    MLflow 3.17 answers with the path that it was given as `model`.
    """
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path(name).symlink_to(checkpoint, target_is_directory=True)
        yield name


def main(config: Config) -> LoggedTransformers:
    checkpoint = local_path(config.source, "source", "fetch")
    require_files(checkpoint, "config.json", made_by="fetch")
    provenance = read_provenance(checkpoint)
    return run_step(
        "log_transformers",
        config,
        LoggedTransformers,
        key={
            "checkpoint": provenance,
            "model": config.model.name,
            "tracking": mlflow.get_tracking_uri(),
            "versions": versions(*LIBRARIES),
        },
        code=[Path(__file__)],
        work=lambda _: log_transformers(checkpoint, provenance, config),
        still_there=lambda result: logged_model_exists(result.model_id),
    )


if __name__ == "__main__":
    entry_point(main)
