"""MLflow's runs and stores: where they are, what they hold, and how a run ends."""

import contextlib
import functools
import logging
import os
import re
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import mlflow
import psutil
import requests
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from omegaconf import OmegaConf

from slm.config import Config
from slm.config.common import ROOT
from slm.errors import InputError, UnreachableError, one_line, told_of
from slm.records import LoggedModels
from slm.redaction import redacted
from slm.running.killed import end_killed, on_record
from slm.running.summary import INTERRUPTED, note

log = logging.getLogger("slm.tracking")

USERNAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
RECORD = "record"  # the tag of a run that says under which name it is on record
PATIENCE_S = 20
TEXT_LIMIT = 5000  # characters of a tag or a description, in MLflow's stores


def settle_tracking() -> None:
    """Make the stores' URIs absolute, and ask a remote tracking server for something.

    A relative URI, MLflow's default among them, would move with the working directory; MLflow
    prints a server's URI with the password in it. Raises UnreachableError if the server, or a
    registry elsewhere, does not answer: at once, unless it opened a run for this process and so is
    away for a while. MLflow's client then tries for minutes.
    """
    registry = os.environ.get("MLFLOW_REGISTRY_URI")
    mlflow.set_tracking_uri(without_password(absolute_uri(mlflow.get_tracking_uri())))
    if registry:
        mlflow.set_registry_uri(without_password(absolute_uri(registry)))
    uris = [mlflow.get_tracking_uri(), mlflow.get_registry_uri()]
    asked = uris[0] if uris[0].startswith(("http://", "https://")) else None
    opened = "MLFLOW_RUN_ID" in os.environ or mlflow.active_run() is not None
    for uri in dict.fromkeys(uris) if not opened else ():
        if uri != asked:
            require_host(uri)
    if asked is None:
        return
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    with environment({} if opened else impatient):
        try:
            mlflow.search_experiments(max_results=1)
        except MlflowException as error:
            log.debug("%s", error)
            raise UnreachableError(
                f"the tracking server {shown_tracking_uri()} cannot be reached, or refuses: "
                f"{textwrap.shorten(one_line(error), 300, placeholder='…')} "
                "Start it, or set MLFLOW_TRACKING_URI."
            ) from error


def require_host(uri: str) -> None:
    """Raise UnreachableError if nothing answers at a store's host; whatever answers will do."""
    what, host, cure = "registry", uri, "Start it, or set MLFLOW_REGISTRY_URI."
    if uri.startswith("databricks"):
        what, host = "Databricks workspace", databricks_host(uri)
        cure = "Check the network, and DATABRICKS_HOST."
    if not host.startswith(("http://", "https://")):
        return
    try:
        requests.head(host, timeout=PATIENCE_S, allow_redirects=False)
    except requests.RequestException as error:
        raise UnreachableError(
            f"the {what} {redacted(host)} cannot be reached: "
            f"{textwrap.shorten(one_line(error), 300, placeholder='…')} {cure}"
        ) from error


def databricks_host(uri: str) -> str:
    """The address of the workspace that a URI means, "" if Databricks' SDK finds none.

    The SDK asks the address of something when it reads its configuration, five minutes long.
    """
    host = os.environ.get("DATABRICKS_HOST", "")  # before that of a profile
    if not host:
        from databricks.sdk.config import Config as Databricks

        profile = urlsplit(uri).netloc
        patience: dict[str, Any] = {
            "retry_timeout_seconds": PATIENCE_S,
            "http_timeout_seconds": PATIENCE_S,
        }
        try:
            found = Databricks(profile=profile or None, **patience)
        except ValueError as error:  # MLflow knows other ways, and says what it needs
            log.debug("%s", one_line(error))
            return ""
        host = found.host or ""
    return host if not host or "://" in host else f"https://{host}"


def absolute_uri(uri: str) -> str:
    """A store's URI that means the same from every working directory.

    Relative are `sqlite:///mlflow.db`, `file:mlruns`, and a bare path.
    """
    folder = calling_folder()
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{(folder / uri.removeprefix('sqlite:///')).resolve()}"
    if re.match(r"file:(?!/)", uri):
        return (folder / uri.removeprefix("file:")).resolve().as_uri()
    if uri and not re.match(r"[\w+.-]+:|databricks$|databricks-uc$|uc$", uri):
        return (folder / Path(uri).expanduser()).resolve().as_uri()
    return uri


def without_password(uri: str) -> str:
    """A server's URI without user and password, which go to where MLflow's client reads them.

    They stay in a URI whose server has others than the tracking server.
    """
    parts = urlsplit(uri)
    if not parts.scheme.startswith("http") or parts.username is None or parts.password is None:
        return uri
    own = {USERNAME: unquote(parts.username), PASSWORD: unquote(parts.password)}
    told = {name: os.environ[name] for name in own if name in os.environ}
    if told not in ({}, own):
        return uri
    os.environ.update(own)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@functools.cache  # MLflow takes MLFLOW_RUN_ID out of the environment when a run starts
def calling_folder() -> Path:
    """The working directory of the `mlflow run` that started this process, else of the process.

    MLflow 3.17 passes its relative URI on to a process in another folder: the project's, which is a
    temporary clone if the project is a git URI.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents() if run_id else []:
            if process.environ().get("MLFLOW_RUN_ID") != run_id:
                return Path(process.cwd())
    return Path.cwd()


def store_variables() -> dict[str, str]:
    """The environment in which a process of its own uses the same stores."""
    return {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
    }


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def shown_tracking_uri() -> str:
    """The tracking store's URI without a password: for people, and for keys that outlive one."""
    return redacted(mlflow.get_tracking_uri())


@contextlib.contextmanager
def mlflow_run(name: str, work: Path, shown: str = "") -> Iterator[mlflow.ActiveRun]:
    """The MLflow run that `mlflow run` opened for this process, else a new one; or a child run.

    What killed processes left open in the same work folder is ended first. A child run is `shown`
    by that name, and ends with its error on it.
    """
    if mlflow.active_run() is not None:
        tags = {"mlflow.project.entryPoint": name}  # as `mlflow run` would set it
        with mlflow.start_run(run_name=shown or name, nested=True, tags=tags) as run:
            hide_secrets(run)
            try:
                yield run
            except KeyboardInterrupt:
                end_run_with_error(name, "interrupted", INTERRUPTED, "KILLED", told=True)
                raise
            except Exception as error:
                end_run_with_error(name, *told_of(error), told=True)
                raise
        return
    end_killed(work)
    run_id, own = os.environ.get("MLFLOW_RUN_ID"), uuid.uuid4().hex
    query = f"attributes.run_id = '{run_id}'" if run_id else f"tags.{RECORD} = '{own}'"
    with on_record(run_id or own, query, work):
        started: dict[str, Any] = {} if run_id else {"run_name": name, "tags": {RECORD: own}}
        try:
            try:
                run = mlflow.start_run(**started)
            except MlflowException as error:
                # MLflow 3.17 creates MLFLOW_EXPERIMENT_NAME if it is missing; another run just did.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                run = mlflow.start_run(**started)
        except MlflowException as error:
            if run_id and "not found" in str(error):
                raise InputError(
                    f"run {run_id} is not in {shown_tracking_uri()}: `mlflow run` was started in "
                    "another folder. Set MLFLOW_TRACKING_URI to an absolute URI."
                ) from error
            raise
        note(run_id=run.info.run_id)
        hide_secrets(run)
        yield run
        mlflow.end_run()  # after an error, entry_point ends the run with the error on it


def note_use(folder: Path) -> None:
    """Name a folder of the work folder on the active run: what a live run names, `clean` leaves."""
    if mlflow.active_run() is not None:
        mlflow.set_tag(f"uses.{folder.name}", folder.parent.name)


def hide_secrets(run: mlflow.ActiveRun) -> None:
    """Take them out of the tags that MLflow set: the project's git URI may hold a token."""
    hidden = {name: redacted(value) for name, value in run.data.tags.items()}
    if changed := {name: hidden[name] for name in hidden if hidden[name] != run.data.tags[name]}:
        mlflow.set_tags(changed)


def end_run_with_error(
    name: str,
    message: str,
    exit_code: int,
    status: str = "FAILED",
    traceback: str | None = None,
    told: bool = False,
) -> None:
    """Print one line, unless it was `told`, and end the MLflow run with it as its tag `error`.

    The `exit_code` is a tag too: `mlflow run` exits with 1 whatever the step exits with. The
    `traceback` of an unexpected error becomes the run's artifact traceback.txt. Secrets are hidden
    in all of it.
    """
    message = redacted(message)
    if not told:
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(MlflowException, OSError):
        if mlflow.active_run() is None and "MLFLOW_RUN_ID" in os.environ:
            mlflow.start_run()
        if mlflow.active_run() is not None:
            mlflow.set_tags({"error": message[:TEXT_LIMIT], "exit_code": exit_code})
            if traceback:
                mlflow.log_text(redacted(traceback), "traceback.txt")
            mlflow.end_run(status)


def log_parameters(
    name: str, config: Config, shared: tuple[str, ...] = ("model", "target", "paths")
) -> None:
    """Log the configuration that the step reads, under dotted names; `shared` besides its own."""
    values: dict[str, Any] = {}

    def flatten(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), value)
        elif node is not None:
            values[prefix] = node

    flatten("", OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    names = ("source", "candidate", "reference", "model_uri", "input", "output")
    inputs = {k: values.pop(k) for k in names if k in values}
    groups = {*shared, name.removesuffix("_onnx")}  # export_onnx reads `export`
    logged = {k: v for k, v in values.items() if k.split(".")[0] in groups}
    logged |= {f"input.{k}": v for k, v in inputs.items()}
    mlflow.log_params({re.sub(r"[^\w./ :-]", "_", k): redacted(str(v)) for k, v in logged.items()})


def local_path(uri: str | None, parameter: str, made_by: str, into: Path | None = None) -> Path:
    """Resolve what the step before handed on: a path, or a URI that MLflow can download.

    What is downloaded lies in `into`, or lasts as long as this process.
    """
    if not uri:
        raise InputError(
            f"{parameter} is missing: pass the URI that {made_by} ended with, as {parameter}=<uri>."
        )
    if not isinstance(uri, str):
        raise InputError(f"{parameter} is {uri}; it must be one URI, that {made_by} ended with.")
    path = ROOT / Path(uri.removeprefix("file://")).expanduser()
    if path.exists():
        return path
    if "://" in uri or uri.startswith(("models:/", "runs:/", "dbfs:/")):
        before, tempfile.tempdir = tempfile.tempdir, str(into or downloads().name)
        try:  # MLflow makes a temporary folder, and leaves it; of a local store it copies nothing
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
        finally:
            tempfile.tempdir = before
    raise InputError(
        f"{parameter}={uri}: no such file or folder. Run {made_by}, and pass the URI it ends with."
    )


@functools.cache
def downloads() -> tempfile.TemporaryDirectory[str]:
    """Where this process downloads to: it lasts as long as the process."""
    # A thread may be downloading still, while the process ends.
    return tempfile.TemporaryDirectory(prefix="slm-", ignore_cleanup_errors=True)


def stores_exist() -> bool:
    """Whether there is anything to ask: to ask MLflow's SQLite store would make the file."""
    uri = mlflow.get_tracking_uri()
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def gone(logged: LoggedModels) -> str:
    """In words, which logged models the tracking server no longer has whole; "" if it has all."""
    lost = [model.uri for model in logged.models if not logged_model_exists(model.model_id)]
    return f"{', '.join(lost)} is gone, or not whole" if lost else ""


def logged_model_exists(model_id: str) -> bool:
    """Whether the tracking server still has the logged model, files and all."""
    if not stores_exist():
        return False
    try:
        whole = mlflow.get_logged_model(model_id).status == LoggedModelStatus.READY
        return whole and bool(mlflow.artifacts.list_artifacts(artifact_uri=f"models:/{model_id}"))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
