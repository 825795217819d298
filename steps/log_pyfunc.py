"""Log an ONNX folder as MLflow models that need no torch, and answer through onnxruntime-genai.

python -m steps.log_pyfunc source=/data/onnx
mlflow models serve -m models:/m-… --env-manager local
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from steps.command import entry_point
from steps.config import ROOT, Config
from steps.provenance import digest_files, digest_of, read_provenance, require_files, size_mb
from steps.step import local_path, logged_model_exists, run_step, versions

log = logging.getLogger("steps.log_pyfunc")

FLAVOR = ROOT / "flavors"


@dataclass(frozen=True)
class LoggedPyfunc:
    """A logged model; `content` is the digest of its weights, code and environment."""

    uri: str
    model_id: str
    name: str
    content: str
    size_mb: float


def log_pyfunc(onnx: Path, provenance: dict[str, Any], config: Config) -> LoggedPyfunc:
    """Log the ONNX folder with its code, signature, parameters, requirements and provenance."""
    requirements = runtime_requirements(config.target.runtime_package)
    content = digest_of([provenance, digest_files(FLAVOR), requirements])
    name = f"{config.model.name}-{config.target.name}-prompt"
    provider = config.target.execution_provider.value
    if provenance.get("checked_on", provider) != provider:
        log.info("log_pyfunc: %s is absent here: the input example is logged untried", provider)
        for noisy in ("mlflow.models.model", "mlflow.utils.requirements_utils"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    logged = mlflow.pyfunc.log_model(
        name=name.replace(".", "_"),  # MLflow forbids dots here, not in the registry
        python_model=str(FLAVOR / "genai" / "prompt.py"),
        code_paths=[str(FLAVOR)],
        artifacts={"onnx": str(onnx)},
        model_config={"execution_provider": provider, "threads": None},
        signature=prompt_signature(),
        input_example=(
            pd.DataFrame({"prompt": ["What is the capital of France?"]}),
            {"max_tokens": 16},
        ),
        pip_requirements=requirements,
        metadata={
            "name": name,
            "model": config.model.name,
            "interface": "prompt",
            "content": content,
            "provenance": provenance,
        },
        tags={"model": config.model.name, "target": config.target.name, "interface": "prompt"},
    )
    return LoggedPyfunc(logged.model_uri, logged.model_id, name, content, size_mb(onnx))


def runtime_requirements(runtime_package: str) -> list[str]:
    """Pins for the logged model: the target's runtime, as it exported, and no torch."""
    pins = versions("mlflow", "numpy", "pandas")
    pins[runtime_package] = versions("onnxruntime-genai")["onnxruntime-genai"]
    return [f"{package}=={version}" for package, version in pins.items()]


def prompt_signature() -> ModelSignature:
    """A string in, a string out, and the parameters of flavors/genai's Sampling."""
    parameters = [
        ParamSpec("max_tokens", DataType.long, 256),
        ParamSpec("temperature", DataType.double, None),
        ParamSpec("top_p", DataType.double, None),
        ParamSpec("top_k", DataType.long, None),
        ParamSpec("repetition_penalty", DataType.double, None),
        ParamSpec("seed", DataType.long, None),
    ]
    inputs, outputs = (
        Schema([ColSpec(DataType.string, "prompt")]),
        Schema([ColSpec(DataType.string)]),
    )
    return ModelSignature(inputs, outputs, ParamSchema(parameters))


def main(config: Config) -> LoggedPyfunc:
    onnx = local_path(config.source, "source", "export_onnx")
    require_files(onnx, "genai_config.json", made_by="export_onnx")
    provenance = read_provenance(onnx)
    return run_step(
        "log_pyfunc",
        config,
        LoggedPyfunc,
        key={
            "onnx": provenance,
            "model": config.model.name,
            "target": asdict(config.target),
            "tracking": mlflow.get_tracking_uri(),
            "versions": versions("mlflow", "onnxruntime-genai"),
        },
        code=[Path(__file__), FLAVOR],
        work=lambda _: log_pyfunc(onnx, provenance, config),
        still_there=lambda result: logged_model_exists(result.model_id),
    )


if __name__ == "__main__":
    entry_point(main)
