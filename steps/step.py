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
import requests
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
    outcome is reused where its result.json stands, the digests of its files match and it is
    `still_there`. `publish` logs to the MLflow run what the step wants seen there, reused or not.
    """
    digest = digest_of({"step": name, "key": key, "code": [digest_files(path) for path in code]})
    folder = ROOT / Path(config.paths.work).expanduser() / name / digest[:16]
    with mlflow_run(name):
        log_parameters(name, config)
        make_folder(folder.parent)
        start = time.monotonic()
        with FileLock(f"{folder}.lock"):
            result = read_result(folder, outcome)
            reused = result is not None and is_intact(folder, result) and still_there(result)
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
    """Whether the tracking server still has the logged model."""
    try:
        return mlflow.get_logged_model(model_id) is not None
    except MlflowException:
        return False


@contextlib.contextmanager
def mlflow_run(name: str) -> Iterator[mlflow.ActiveRun]:
    """The MLflow run that `mlflow run` opened for this process, else a new one."""
    require_tracking_server()
    run_id = os.environ.get("MLFLOW_RUN_ID")
    try:
        run = mlflow.start_run(run_name=None if run_id else name)
    except MlflowException as error:
        if run_id and "not found" in str(error):
            raise ValueError(
                f"run {run_id} is not in {mlflow.get_tracking_uri()}: `mlflow run` was started in "
                "another folder. Set MLFLOW_TRACKING_URI to an absolute URI."
            ) from error
        raise
    yield run
    mlflow.end_run()  # after an error, entry_point ends the run with the error on it


def end_run_with_error(name: str, message: str, status: str = "FAILED") -> None:
    """Print one line, and end the MLflow run with that line as its tag `error`."""
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(MlflowException, requests.RequestException, OSError):
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
    """Fix the tracking URI, and ask a remote server for its health once.

    By default the URI moves with the working directory; MLflow's client would retry for minutes.
    """
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    mlflow.set_tracking_uri(uri)
    if not uri.startswith(("http://", "https://")):
        return
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=10)
    except requests.ConnectionError as error:
        raise ConnectionError(
            f"the tracking server {re.sub('//[^@/]*@', '//', uri)} cannot be reached. "
            "Start it, or set MLFLOW_TRACKING_URI."
        ) from error


def log_parameters(name: str, config: Config) -> None:
    """Log the configuration under dotted names, and the versions of the libraries."""
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
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        return outcome(**json.loads(path.read_text())["outcome"])
    except (ValueError, TypeError, KeyError):
        log.info("%s cannot be read: made anew", path)
        return None


def write_result(folder: Path, result: Outcome, digest: str) -> None:
    """Write result.json in one motion: where it stands, the step finished."""
    text = json.dumps({"key": digest, "outcome": dataclasses.asdict(result)}, indent=2)
    partial = folder / "result.json.partial"
    partial.write_text(text + "\n")
    partial.replace(folder / "result.json")


def is_intact(folder: Path, result: Outcome) -> bool:
    """Whether the files that an outcome lists still have their digests."""
    files = getattr(result, "files", {})
    if not files or digest_files(Path(result.uri)) == files:
        return True
    log.info("%s changed since it was made: made anew", folder)
    return False


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
