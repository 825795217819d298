"""Put what passed its evaluation into the Model Registry, under an alias.

    python -m steps.register source=work/evaluate/<key>
    python -m steps.register source=runs:/<run id of evaluate>/result.json register.alias=challenger

Every logged model becomes a version: the interfaces of the ONNX model, and the checkpoint that it
was held against.
Without a passing verdict no version gets the alias; after a failed one nothing is registered at
all.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.command import entry_point
from steps.config import Config
from steps.step import local_path, run_step

log = logging.getLogger("steps.register")


@dataclass(frozen=True)
class Registration:
    """Versions, as dicts of name, version and alias ("": none); `uri` is the one measured."""

    uri: str
    verdict: str
    versions: list[dict[str, str]]


def register(evaluation: dict[str, Any], alias: str) -> Registration:
    """Make a version of each model, unless there is one; set the alias on both at the end."""
    verdict = evaluation["verdict"]
    if verdict == "failed":
        raise ValueError(
            f"not registered, the evaluation failed: {'; '.join(evaluation['reasons'])}."
        )
    client = MlflowClient()
    models = [*evaluation["candidates"], evaluation["reference"]]
    versions = [version_of(client, uri, evaluation) for uri in models]
    if verdict != "passed":
        log.info("register: no alias %s: %s", alias, "; ".join(evaluation["reasons"]))
        alias = ""
    for version in versions if alias else []:
        client.set_registered_model_alias(version.name, alias, version.version)
    return Registration(
        uri=f"models:/{versions[0].name}@{alias}"
        if alias
        else f"models:/{versions[0].name}/{versions[0].version}",
        verdict=verdict,
        versions=[{"name": v.name, "version": str(v.version), "alias": alias} for v in versions],
    )


def version_of(client: MlflowClient, uri: str, evaluation: dict[str, Any]) -> ModelVersion:
    """The version of a logged model's content under this verdict, made if need be."""
    info = mlflow.models.get_model_info(uri)
    metadata = info.metadata or {}
    name, tags = metadata["name"], provenance_tags(metadata, evaluation)
    content = f"name = '{name}' and tags.content = '{tags['content']}'"
    for version in client.search_model_versions(content):
        # A verdict is about the ONNX model; the checkpoint serves many targets as their reference.
        if "target" not in tags or version.tags.get("verdict") == tags["verdict"]:
            log.info("register: %s version %s holds this content already", name, version.version)
            return version
    return mlflow.register_model(uri, name, tags=tags)


def provenance_tags(metadata: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, str]:
    """What a version says of itself: where it came from, what made it, how it was judged."""
    provenance = metadata["provenance"]
    checkpoint = provenance.get("checkpoint", provenance)
    tags = {
        "content": metadata["content"],
        "interface": metadata["interface"],
        "target": provenance.get("target", ""),
        "source": checkpoint["source"],
        "revision": checkpoint.get("revision", ""),
        "licence": checkpoint.get("licence", ""),
        "verdict": evaluation["verdict"],
        "verdict_reasons": "; ".join(evaluation["reasons"]),
        "evaluated_with": evaluation["candidates"][0]
        if "target" not in provenance
        else evaluation["reference"],
        "versions": json.dumps(provenance.get("versions", {})),
        "sha256": json.dumps(
            {n: d for n, d in provenance["files"].items() if n.endswith((".data", ".safetensors"))}
        ),
    }
    return {key: value[:5000] for key, value in tags.items() if value}


def is_registered(registration: Registration) -> bool:
    """Whether the registry has the versions, and their aliases on them."""
    client = MlflowClient()
    try:
        for made in registration.versions:
            version = client.get_model_version(made["name"], made["version"])
            if made["alias"] and made["alias"] not in version.aliases:
                log.info("register: alias %(alias)s of %(name)s was moved: set again", made)
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
    try:
        evaluation = json.loads(path.read_text())["outcome"]
        fields = ("candidates", "reference", "verdict", "reasons", "gates")
        return {k: evaluation[k] for k in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what evaluate ends with. Pass its uri as source."
        ) from error


def main(config: Config) -> Registration:
    evaluation = read_evaluation(local_path(config.source, "source", "evaluate"))
    return run_step(
        "register",
        config,
        Registration,
        key={
            "evaluation": evaluation,
            "alias": config.register.alias,
            "registry": mlflow.get_registry_uri(),
        },
        code=[Path(__file__)],
        work=lambda _: register(evaluation, config.register.alias),
        still_there=is_registered,
    )


if __name__ == "__main__":
    entry_point(main)
