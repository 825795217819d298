"""What every step shares: its MLflow run, its key, reuse, and result.json last.

A step calls `run_step` once, with what shapes its outcome and a function that makes it:

    run_step("export_onnx", config, OnnxModel, key={…}, work=lambda folder: export_onnx(…, folder))
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf
from safetensors import SafetensorError

from steps.config import ROOT, Config
from steps.provenance import digest_files, digest_of

log = logging.getLogger("steps")

# What a user can cause and mend: reported as one line, without a traceback.
EXPECTED_ERRORS = (OSError, ValueError, RuntimeError, MlflowException, SafetensorError)


class Outcome(Protocol):
    """A frozen dataclass; `uri` is what the next step takes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def uri(self) -> str: ...


T = TypeVar("T", bound=Outcome)


def run_step(
    name: str,
    config: Config,
    outcome: type[T],
    *,
    key: dict[str, Any],
    code: list[Path],
    work: Callable[[Path], T],
    still_there: Callable[[T], bool] = lambda _: True,
    publish: Callable[[T], None] = lambda _: None,
) -> T:
    """Make a step's outcome in `<paths.work>/<name>/<key>/`, or reuse the one that is there.

    `key` names everything that shapes the outcome besides the step's `code` (files and folders). An
    outcome is reused where its result.json stands, every file in the folder has the digest that it
    lists, and it is `still_there`. `publish` logs what belongs on the MLflow run, reused or not.
    """
    code = [*code, ROOT / "steps" / "provenance.py"]
    digest = digest_of({"step": name, "key": key, "code": [digest_files(path) for path in code]})
    folder = ROOT / Path(config.paths.work).expanduser() / name / digest[:16]
    with mlflow_run(name):
        log_parameters(name, config)
        make_folder(folder.parent)
        start = time.monotonic()
        with FileLock(f"{folder}.lock"):
            result = read_result(folder, outcome)
            reused = result is not None and still_there(result)
            if result is None or not reused:
                log.info("%s: started, in %s", name, folder)
                shutil.rmtree(folder, ignore_errors=True)
                make_folder(folder)
                try:
                    result = work(folder)
                    write_result(folder, result, digest)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        seconds = time.monotonic() - start
        log.info("%s: %s in %.1f s: %s", name, "reused" if reused else "done", seconds, result.uri)
        mlflow.set_tags({"reused": str(reused).lower(), "key": digest[:16]})
        mlflow.log_metrics({"duration_s": seconds, **numbers(result)})
        publish(result)
        mlflow.log_artifact(str(folder / "result.json"))
    return result


def local_path(uri: str | None, parameter: str, made_by: str) -> Path:
    """Resolve what the step before handed on: a path, or a URI that MLflow can download."""
    if not uri:
        raise ValueError(
            f"{parameter} is missing: pass the URI that {made_by} ended with, as {parameter}=<uri>."
        )
    path = ROOT / Path(uri.removeprefix("file://")).expanduser()
    if path.exists():
        return path
    if "://" in uri or uri.startswith(("models:/", "runs:/", "dbfs:/")):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    raise FileNotFoundError(
        f"{parameter}={uri}: no such file or folder. Run {made_by}, and pass the URI it ends with."
    )


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of the libraries that shape an outcome."""
    return {package: importlib.metadata.version(package) for package in packages}


def logged_model_exists(model_id: str) -> bool:
    """Whether the tracking server still has the logged model, files and all."""
    try:
        mlflow.get_logged_model(model_id)
        return bool(mlflow.artifacts.list_artifacts(artifact_uri=f"models:/{model_id}"))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


@contextlib.contextmanager
def mlflow_run(name: str) -> Iterator[mlflow.ActiveRun]:
    """The MLflow run that `mlflow run` opened for this process, else a new one."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    try:
        run = mlflow.start_run(run_name=None if run_id else name)
    except MlflowException as error:
        if run_id and "not found" in str(error):
            raise ValueError(
                f"run {run_id} is not in {shown_tracking_uri()}: `mlflow run` was started in "
                "another folder. Set MLFLOW_TRACKING_URI to an absolute URI."
            ) from error
        raise
    yield run
    mlflow.end_run()  # after an error, entry_point ends the run with the error on it


def end_run_with_error(name: str, message: str, status: str = "FAILED") -> None:
    """Print one line, and end the MLflow run with that line as its tag `error`."""
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(MlflowException, OSError):
        if mlflow.active_run() is None and "MLFLOW_RUN_ID" in os.environ:
            mlflow.start_run()
        if mlflow.active_run() is not None:
            mlflow.set_tag("error", message[:5000])
            mlflow.end_run(status)


def one_line(error: BaseException) -> str:
    """The error in one line; a full disk and a refused write name their cure."""
    text = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return (
            f"the disk is full ({text}). Free space there, or set paths.work to a folder with more."
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return f"cannot write ({text}). Set paths.work to a folder that you may write to."
    return text


def require_tracking_server() -> None:
    """Fix the tracking URI, and ask a remote server for something once.

    By default the URI moves with the working directory; MLflow's client would retry for minutes.
    """
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    mlflow.set_tracking_uri(uri)
    if not uri.startswith(("http://", "https://")):
        return
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    before = {name: os.environ.get(name) for name in impatient}
    os.environ.update(impatient)
    try:
        mlflow.search_experiments(max_results=1)
    except MlflowException as error:
        log.debug("%s", error)
        raise ConnectionError(
            f"the tracking server {shown_tracking_uri()} cannot be reached, or refuses: "
            f"{one_line(error)[:300]} Start it, or set MLFLOW_TRACKING_URI."
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def shown_tracking_uri() -> str:
    """The tracking URI without the user and password that it may hold."""
    return re.sub("//[^@/]*@", "//", mlflow.get_tracking_uri())


def log_parameters(name: str, config: Config) -> None:
    """Log the configuration that the step reads, under dotted names."""
    values: dict[str, Any] = {}

    def flatten(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), value)
        elif node is not None:
            values[prefix] = node

    flatten("", OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    inputs = {k: values.pop(k) for k in ("source", "candidate", "reference") if k in values}
    groups = {"model", "target", "paths", name}
    mlflow.log_params(
        {re.sub(r"[^\w./ :-]", "_", k): v for k, v in values.items() if k.split(".")[0] in groups}
    )
    mlflow.log_params({f"input.{k}": v for k, v in inputs.items()})


def read_result(folder: Path, outcome: type[T]) -> T | None:
    """The outcome that a folder holds, unless a file of it changed since."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        recorded = json.loads(path.read_text())
        result, digests = outcome(**recorded["outcome"]), recorded["sha256"]
    except (ValueError, TypeError, KeyError):
        log.info("%s cannot be read: made anew", path)
        return None
    found = {name: digest for name, digest in digest_files(folder).items() if name != path.name}
    if found != digests:
        log.info("%s changed since it was made: made anew", folder)
        return None
    return result


def write_result(folder: Path, result: Outcome, digest: str) -> None:
    """Write result.json in one motion: where it stands, the step finished."""
    record = {
        "key": digest,
        "outcome": dataclasses.asdict(result),
        "sha256": digest_files(folder),
    }
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(folder / "result.json")


def numbers(result: Outcome) -> dict[str, float]:
    """The outcome's numbers, as metrics."""
    values = dataclasses.asdict(result)
    return {
        k: float(v)
        for k, v in values.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }


def make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def set_up_logging() -> None:
    """Plain lines with the time on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
