"""Log an ONNX folder as MLflow models that need no torch, one for each interface.

    python -m steps.log_pyfunc source=/data/onnx
    python -m steps.log_pyfunc source=/data/onnx log_pyfunc.interfaces=[chat]
    mlflow models serve -m models:/m-… --env-manager local

Ends with a proof: the models are asked in an environment of their own requirements alone.
"""

import logging
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import AnyType, Array, Object, Property

from steps.command import entry_point
from steps.config import ROOT, Config, Interface
from steps.provenance import digest_files, digest_of, read_provenance, require_files, size_mb
from steps.step import local_path, logged_model_exists, run_step, versions

log = logging.getLogger("steps.log_pyfunc")

FLAVOR = ROOT / "flavors"
QUESTION = "What is the capital of France?"
# The parameters that a load may override; null leaves them as the checkpoint has them.
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")


@dataclass(frozen=True)
class LoggedPyfunc:
    """The logged models of one ONNX folder, as dicts of interface, model_id, name and content.

    `content` is the digest of the weights, code, environment and settings of one; `uri` holds the
    models' URIs with + between.
    """

    uri: str
    models: list[dict[str, str]]
    size_mb: float


def log_pyfunc(onnx: Path, provenance: dict[str, Any], config: Config) -> LoggedPyfunc:
    """Log a model for each interface, and ask them in a fresh environment of their own."""
    requirements = runtime_requirements(config.target.runtime_package)
    provider = config.target.execution_provider.value
    tried_here = provenance.get("checked_on", provider) == provider
    if not tried_here:
        log.info("log_pyfunc: %s is absent here: the input example is logged untried", provider)
        for noisy in ("mlflow.models.model", "mlflow.utils.requirements_utils"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    models = [
        log_interface(interface, onnx, provenance, requirements, config)
        for interface in config.log_pyfunc.interfaces
    ]
    uris = [f"models:/{model['model_id']}" for model in models]
    if config.log_pyfunc.prove_environment and tried_here:
        prove_environment(requirements, uris)
    return LoggedPyfunc("+".join(uris), models, size_mb(onnx))


def log_interface(
    interface: Interface,
    onnx: Path,
    provenance: dict[str, Any],
    requirements: list[str],
    config: Config,
) -> dict[str, str]:
    """Log the ONNX folder with an interface's code, signature, settings and provenance."""
    settings = {
        "model": config.model.name,
        "execution_provider": config.target.execution_provider.value,
        "threads": config.log_pyfunc.threads,
        "max_batch_size": config.log_pyfunc.max_batch_size,
        "max_queue_size": config.log_pyfunc.max_queue_size,
        "cache_mb": config.log_pyfunc.cache_mb,
        "context_length": None,
        "max_tokens": config.log_pyfunc.max_tokens,
        **dict.fromkeys(SAMPLING),
        "sha256": provenance["files"],
    }
    content = digest_of([provenance, digest_files(FLAVOR), requirements, settings, interface.value])
    name = f"{config.model.name}-{config.target.name}-{interface.value}"
    signature, example = SIGNATURES[interface]()
    logged = mlflow.pyfunc.log_model(
        name=name.replace(".", "_"),  # MLflow forbids dots here, not in the registry
        python_model=str(FLAVOR / "genai" / f"{interface.value}.py"),
        code_paths=[str(FLAVOR)],
        artifacts={"onnx": str(onnx)},
        model_config=settings,
        signature=signature,
        input_example=example,
        pip_requirements=requirements,
        metadata={
            "name": name,
            "model": config.model.name,
            "interface": interface.value,
            "content": content,
            "provenance": provenance,
        },
        tags={
            "model": config.model.name,
            "target": config.target.name,
            "interface": interface.value,
        },
    )
    return {
        "interface": interface.value,
        "model_id": logged.model_id,
        "name": name,
        "content": content,
    }


def runtime_requirements(runtime_package: str) -> list[str]:
    """Pins for the logged model: the target's runtime, as it exported, and no torch."""
    pins = versions("mlflow", "numpy")
    pins[runtime_package] = versions("onnxruntime-genai")["onnxruntime-genai"]
    return [f"{package}=={version}" for package, version in pins.items()]


def prompt_signature() -> tuple[ModelSignature, Any]:
    """A string in, a string out; the parameters of flavors/genai, one MLflow type each."""
    response_format = Object(
        [
            Property("type", DataType.string),
            Property("json_schema", AnyType(), required=False),
        ]
    )
    parameters = [
        ParamSpec("max_tokens", DataType.long, None),
        ParamSpec("temperature", DataType.double, None),
        ParamSpec("top_p", DataType.double, None),
        ParamSpec("top_k", DataType.long, None),
        ParamSpec("repetition_penalty", DataType.double, None),
        ParamSpec("seed", DataType.long, None),
        ParamSpec("stop", DataType.string, [], shape=(-1,)),
        ParamSpec("n", DataType.long, None),
        ParamSpec("response_format", response_format, {"type": "text"}),
    ]
    inputs = Schema([ColSpec(DataType.string, "prompt")])
    outputs = Schema([ColSpec(DataType.string)])
    example = pd.DataFrame({"prompt": [QUESTION]}), {"max_tokens": 16}
    return ModelSignature(inputs, outputs, ParamSchema(parameters)), example


def chat_signature() -> tuple[ModelSignature, Any]:
    """The fields of the transformers flavor's `llm/v1/chat`, and those that it lacks."""
    message = Object(
        [
            Property("role", DataType.string),
            Property("content", AnyType(), required=False),  # a string, or OpenAI's list of parts
            Property("name", DataType.string, required=False),
        ]
    )
    columns: list[Any] = [ColSpec(Array(message), "messages")]
    names = [column.name for column in CHAT_MODEL_INPUT_SCHEMA if column.name != "messages"]
    names += ["max_completion_tokens", "seed", "repetition_penalty", "response_format"]
    names += ["logprobs", "top_logprobs", "tool_choice", "logit_bias"]
    # Of any type: flavors/genai says what is wrong in fewer words than MLflow, which takes no 2 for
    # 2.0, and `stop` is a string or a list.
    columns += [ColSpec(AnyType(), name, required=False) for name in names]
    example = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16}
    return ModelSignature(Schema(columns), CHAT_MODEL_OUTPUT_SCHEMA), example


SIGNATURES = {Interface.prompt: prompt_signature, Interface.chat: chat_signature}


def prove_environment(requirements: list[str], uris: list[str]) -> None:
    """Build an environment of the requirements alone, and ask the models in it.

    Raises RuntimeError where it cannot be built, has torch, or a model does not answer.
    """
    folders = [mlflow.artifacts.download_artifacts(artifact_uri=uri) for uri in uris]
    with tempfile.TemporaryDirectory() as scratch:
        log.info("log_pyfunc: building an environment of %s", ", ".join(requirements))
        python = Path(scratch) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        run([sys.executable, "-m", "venv", scratch], "the environment cannot be made")
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        # Bytecode of all that is installed takes longer than installing it.
        install += ["--no-compile", *requirements]
        run(install, "the logged requirements cannot be installed")
        question = [str(python), str(ROOT / "steps" / "ask.py"), *folders]
        run(question, "the models do not answer in an environment of their own requirements")
    log.info("log_pyfunc: the models answer in a fresh environment, where torch is absent")


def run(command: list[str], complaint: str) -> None:
    """Run a command; RuntimeError with the end of its output where it fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = (process.stderr or process.stdout).strip().splitlines()[-5:]
        raise RuntimeError(f"{complaint}: {' '.join(lines)}")


def all_exist(result: LoggedPyfunc) -> bool:
    return all(logged_model_exists(model["model_id"]) for model in result.models)


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
            "log_pyfunc": asdict(config.log_pyfunc),
            "tracking": mlflow.get_tracking_uri(),
            "versions": versions("mlflow", "onnxruntime-genai"),
        },
        code=[Path(__file__), ROOT / "steps" / "ask.py", FLAVOR],
        work=lambda _: log_pyfunc(onnx, provenance, config),
        still_there=all_exist,
    )


if __name__ == "__main__":
    entry_point(main)
