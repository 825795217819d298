"""Log an ONNX folder as MLflow models that need no torch, one for each interface.

    python -m steps.log_pyfunc source=/data/onnx
    python -m steps.log_pyfunc source=/data/onnx log_pyfunc.interfaces=[chat]
    python -m steps.log_pyfunc source=[/data/for-cuda,/data/for-cpu] target=cuda-fp16
    mlflow models serve -m models:/m-… --env-manager local

Ends with a proof: the models are asked in an environment of their own requirements alone.
"""

import contextlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mlflow
from mlflow.models import Model

from slm.bundle import bundle, digests_of, provider_of
from slm.config import Config
from slm.config.common import ROOT
from slm.config.packaging import Interface, LogPyfunc, Signing
from slm.config.target import Target
from slm.digests import (
    Provenance,
    digest_files,
    digest_of,
    read_provenance,
    require_files,
    require_model,
    size_mb,
)
from slm.environments import environment_of
from slm.errors import InputError, StepError
from slm.proof import prove
from slm.records import ANY, LoggedModel, LoggedModels
from slm.running.command import entry_point
from slm.running.lineage import link_training, training_tags
from slm.running.links import copies_as_links
from slm.running.run import run_step
from slm.running.tracking import gone, local_path, note_use, shown_tracking_uri
from slm.running.work import versions, work_folder
from slm.seal import Sealed, require_key_to_sign, signed_by, verifier_requirements
from slm_pyfunc.parameters import AT_LOAD
from slm_pyfunc.settings import Settings
from slm_pyfunc.signatures import chat_signature, prompt_signature
from slm_pyfunc.verify import PUBLIC_KEY

log = logging.getLogger("slm.log_pyfunc")

PACKAGE = ROOT / "slm_pyfunc"
SIGNATURES = {Interface.prompt: prompt_signature, Interface.chat: chat_signature}
CLASSES = {Interface.prompt: "PromptModel", Interface.chat: "ChatModel"}
FORBIDDEN = ("torch", "transformers")  # in the environment of a logged ONNX model


@dataclass(frozen=True)
class Packaging:
    """What is logged of an ONNX folder besides the folder: the same for each interface.

    `target` is that of the folder, or the first of those that it is for.
    """

    model: str
    target: Target
    settings: LogPyfunc
    requirements: list[str]
    signing: Signing
    tool_calls: str = "none"


def log_pyfunc(onnx: Path, provenance: Provenance, packaging: Packaging, work: str) -> LoggedModels:
    """Log a model for each interface, and ask them in a fresh environment of their own."""
    provider = packaging.target.execution_provider.value
    first = provenance.parts.get(packaging.target.name, provenance)
    tried_here = (first.checked_on or provider) == provider
    if not tried_here:
        log.info("%s is absent here: the input example is logged untried", provider)
        for noisy in ("mlflow.models.model", "mlflow.utils.requirements_utils"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    models = [
        log_interface(interface, onnx, provenance, packaging)
        for interface in packaging.settings.interfaces
    ]
    if packaging.settings.prove_environment and tried_here:
        uris, key = [model.uri for model in models], packaging.signing.public_key
        prove_environment(packaging.requirements, uris, work, key)
    return LoggedModels(models[0].uri, models, size_mb(onnx))


def log_interface(
    interface: Interface, onnx: Path, provenance: Provenance, packaging: Packaging
) -> LoggedModel:
    """Log the ONNX folder with an interface's code, signature, settings and provenance."""
    provider = packaging.target.execution_provider.value
    # A list, since MLflow sorts the keys of what it stores.
    parts = [[name, provider_of(onnx / name)] for name in provenance.parts]
    target = provenance.target if parts else packaging.target.name
    settings = {
        "model_name": packaging.model,  # `model` is a parameter of the run
        "tool_calls": packaging.tool_calls,
        "execution_provider": None if parts else provider,
        **({"targets": parts} if parts else {}),
        **{field.name: getattr(packaging.settings, field.name) for field in fields(Settings)},
        **dict.fromkeys(AT_LOAD),  # null: as the checkpoint has them
        "max_tokens": packaging.settings.max_tokens,
        "sha256": digests_of(onnx, provenance) if parts else provenance.files,
    }
    code = digest_of(digest_files(PACKAGE))
    model = LoggedModel(
        uri="",
        name=f"{packaging.model}-{target}-{interface.value}",
        model=packaging.model,
        interface=interface.value,
        content=digest_of(
            [provenance.identity, code, packaging.requirements, settings, interface.value]
        ),
        provenance=provenance,
        execution_provider=ANY if parts else provider,
        size_mb=size_mb(onnx),
    )
    signature, example = SIGNATURES[interface]()
    with shipped_code(interface, f"{PACKAGE.name}_{code[:12]}") as (package, entry):
        logged = Model.log(
            artifact_path=None,  # deprecated, and still required
            name=model.logged_name,
            flavor=Sealed(mlflow.pyfunc, model, packaging.requirements, packaging.signing),
            flavor_name="pyfunc.ModelFromCode",  # as mlflow.pyfunc.log_model calls it
            python_model=str(entry),
            code_paths=[str(package)],
            artifacts={"onnx": str(onnx)},
            model_config=settings,
            signature=signature,
            input_example=example,
            metadata=model.metadata(),
            tags={
                "model": packaging.model,
                "target": target,
                "interface": interface.value,
                **training_tags(provenance),
            },
        )
    return model.stored_as(logged.model_uri)


@contextlib.contextmanager
def shipped_code(interface: Interface, name: str) -> Iterator[tuple[Path, Path]]:
    """slm_pyfunc under a name of its own, and the file that MLflow runs to get the model.

    The name holds the digest of the code, so that two versions of it can live in one process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / name
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        entry, model_class = Path(scratch) / f"{interface.value}_model.py", CLASSES[interface]
        entry.write_text(
            "import sys\n\nimport mlflow\n\n"
            "sys.dont_write_bytecode, before = True, sys.dont_write_bytecode  # it may be signed\n"
            f"from {name}.{interface.value} import {model_class}\n\n"
            "sys.dont_write_bytecode = before\n"
            f"mlflow.models.set_model({model_class}())\n"
        )
        sys.path.insert(0, scratch)
        before = set(sys.modules)
        try:
            yield package, entry
        finally:
            sys.path.remove(scratch)
            for module in set(sys.modules) - before:  # MLflow tried the model: from this folder
                if module.split(".")[0] == name:
                    del sys.modules[module]


def runtime_requirements(target: Target) -> list[str]:
    """Pins for the logged model: the target's runtime, as it exported, and no torch."""
    pins = versions("mlflow", "numpy", "llguidance")
    pins[target.runtime_package] = versions("onnxruntime-genai")["onnxruntime-genai"]
    own = [target.provider_package] if target.provider_package else []
    return [f"{package}=={version}" for package, version in pins.items()] + own


def prove_environment(
    requirements: list[str], uris: list[str], work: str, public_key: str | None = None
) -> None:
    """Ask the models in an environment of the requirements alone; signed ones verify themselves.

    Raises StepError if it cannot be built, has torch, or a model does not answer.
    """
    folders = [mlflow.artifacts.download_artifacts(artifact_uri=uri) for uri in uris]
    python = environment_of(requirements, work_folder(work) / "environments")
    note_use(python.parents[1])
    key = {PUBLIC_KEY: public_key or ""}
    if complaint := prove(folders, python=str(python), forbid=FORBIDDEN, environment=key):
        raise StepError(
            f"the models do not answer in an environment of their requirements: {complaint}"
        )
    log.info("the models answer in an environment of their own, where torch is absent")


def require_first(provenances: list[Provenance], config: Config) -> None:
    """Raise InputError unless the folders are those of log_pyfunc.targets, and of `target` first.

    Its runtime is what the model requires.
    """
    found, told = [provenance.target for provenance in provenances], config.log_pyfunc.targets
    if found[0] != config.target.name:
        raise InputError(
            f"source begins with a folder for {found[0]}; target is {config.target.name}. Give "
            f"target={found[0]}: its runtime is what the model requires."
        )
    if told and found != told:
        raise InputError(f"source is for {found}; log_pyfunc.targets is {told}.")


def main(config: Config) -> LoggedModels:
    uris = config.source if isinstance(config.source, list) else [config.source]
    folders = [local_path(uri, "source", "export_onnx") for uri in uris]
    for folder in folders:
        require_files(folder, "genai_config.json", made_by="export_onnx")
    provenances = [read_provenance(folder) for folder in folders]
    for provenance in provenances:
        require_model(provenance, config.model.name)
    if len(folders) > 1 or config.log_pyfunc.targets:
        require_first(provenances, config)
    require_key_to_sign(config.signing)
    packaging = Packaging(
        config.model.name,
        config.target,
        config.log_pyfunc,
        runtime_requirements(config.target) + verifier_requirements(config.signing),
        config.signing,
        config.model.tool_calls,
    )

    def make(folder: Path) -> LoggedModels:
        onnx, provenance = folders[0], provenances[0]
        if len(folders) > 1:
            onnx = folder / "onnx"
            provenance = bundle(folders, provenances, onnx)
        with copies_as_links(onnx, work_folder(config.paths.work)):
            logged = log_pyfunc(onnx, provenance, packaging, config.paths.work)
        shutil.rmtree(folder / "onnx", ignore_errors=True)
        return logged

    return run_step(
        "log_pyfunc",
        config,
        LoggedModels,
        key={
            "onnx": [provenance.identity for provenance in provenances],
            "packaging": asdict(packaging) | {"signing": signed_by(config.signing)},
            "ships": digest_files(PACKAGE),
            "tracking": shown_tracking_uri(),
        },
        make=make,
        publish=lambda *_: link_training(provenance),
        stale=gone,
    )


if __name__ == "__main__":
    entry_point(main)
