"""The models that a server serves, each a logged model that was loaded and has answered."""

import contextlib
import gc
import logging
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slm.config.packaging import Signing
from slm.errors import InputError, StepError, one_line
from slm.records import LoggedModel
from slm.registry.names import version_uri
from slm.running.memory import rss_mb
from slm.running.tracking import downloads, local_path
from slm.seal import require_signed
from slm.serving.errors import ApiError
from slm.serving.inbox import Inbox
from slm.serving.one_by_one import OneByOne

log = logging.getLogger("slm.serve")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"  # OpenAI's routes
QUESTION = "Say yes."  # the first thing that a model is asked


@dataclass(eq=False)
class Served:
    """A loaded model, under the name that clients ask for.

    `under_way` counts the requests that it is answering; it is closed once it was replaced and
    they have ended.
    """

    name: str
    uri: str  # as given: an alias may move
    model: LoggedModel
    pyfunc: Any
    version: str = ""  # of the registered model, if an alias named it
    resident_mb: float = 0.0  # what the process took up for it
    created: int = field(default_factory=lambda: int(time.time()))
    under_way: int = 0
    replaced: bool = False

    def __post_init__(self) -> None:
        python_model = None
        if self.model.is_onnx:
            python_model = self.pyfunc.unwrap_python_model()
        self.runtime: Any = getattr(python_model, "runtime", None)
        self.streams = hasattr(python_model, "begin")
        self.asked: Any = python_model if self.streams else OneByOne(self.pyfunc)

    @property
    def route(self) -> str:
        return CHAT if self.model.interface == "chat" else TEXT

    @property
    def field(self) -> str:
        """What a body has to have."""
        return "messages" if self.model.interface == "chat" else "prompt"

    def begin(self, request: dict[str, Any], inbox: Inbox, streamed: bool) -> Any:
        """Begin to answer a body of its route: an Answer (slm_pyfunc/interface.py), on its way."""
        if not self.streams and self.model.interface != "chat":
            raise ApiError(
                400,
                f"{self.name} was logged by an earlier version of the project, which has no "
                f"{self.route}. Log it again, or ask /invocations.",
            )
        return self.asked.begin(request, inbox, streamed)

    def answer(self) -> None:
        """Ask it for a token; StepError if it does not answer."""
        asked: dict[str, Any] = {"max_tokens": 1}
        try:
            if self.model.interface == "chat":
                messages = [{"role": "user", "content": QUESTION}]
                self.pyfunc.predict({"messages": messages, **asked})
            else:
                self.pyfunc.predict({"prompt": QUESTION}, params=asked)
        except Exception as error:  # of whatever library
            raise StepError(f"{self.uri} does not answer: {one_line(error)}") from error

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Meanwhile it is not closed; from the loop's thread."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self.close_if_over()

    def replace(self) -> None:
        """No request comes any more."""
        self.replaced = True
        self.close_if_over()

    def close_if_over(self) -> None:
        if self.replaced and not self.under_way and self.pyfunc is not None:
            log.info("%s: the last answer of %s has ended", self.name, self.model.uri)
            held = [self.pyfunc, self.asked, self.runtime]
            self.pyfunc = self.asked = self.runtime = None
            threading.Thread(target=free, args=(held,), name="free", daemon=True).start()


def free(held: list[Any]) -> None:
    """Drop what holds a model, which takes its time; its memory and files go with it."""
    held.clear()
    gc.collect()


def load(uri: str, signing: Signing, settings: dict[str, Any]) -> Served:
    """Download, verify and load a model, and have it answer.

    What was downloaded lasts as long as the model, which reads some files only when they are
    needed. Interfaces of the same weights share a runtime, and so the files of one of them.
    """
    start, before = time.monotonic(), rss_mb()
    files = Path(tempfile.mkdtemp(prefix="serve-", dir=downloads().name))
    try:
        pinned, version = pinned_uri(uri)
        folder = local_path(pinned, "model_uri", "register", files)
        model = LoggedModel.load(str(folder))
        require_signed([str(folder)], signing)
        own = settings if model.is_onnx else {}
        pyfunc = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True, model_config=own)
        served = Served(name_of(uri, model), uri, model, pyfunc, version)
        served.answer()
        served.resident_mb = rss_mb() - before
    except BaseException:
        shutil.rmtree(files, ignore_errors=True)
        raise
    finally:
        mlflow.models.model.__mlflow_model__ = None  # MLflow 3.17 would keep the last one loaded
    owner = pyfunc if served.runtime is None else served.runtime
    weakref.finalize(owner, shutil.rmtree, files, ignore_errors=True)
    log.info("%s: loaded %s in %.1f s", served.name, model.uri, time.monotonic() - start)
    return served


def pinned_uri(uri: str) -> tuple[str, str]:
    """The URI of the version that an alias names now, and the version; other URIs as they are."""
    if (alias := alias_of(uri)) is None:
        return uri, ""
    try:
        version = MlflowClient().get_model_version_by_alias(*alias)
    except MlflowException as error:
        raise InputError(f"model_uri={uri} names no version: {one_line(error)}") from error
    return version_uri(version), str(version.version)


def alias_of(uri: str) -> tuple[str, str] | None:
    """Registered name and alias of models:/name@alias."""
    found = re.fullmatch(r"models:/([^@]+)@(.+)", uri)
    return (found[1], found[2]) if found else None


def name_of(uri: str, model: LoggedModel) -> str:
    """The registered name in models:/name@alias or models:/name/version; else the model's own."""
    registered = re.fullmatch(r"models:/([^@/]+)(@.+|/.+)", uri)
    return registered[1] if registered else model.name


def require_distinct(models: list[Served]) -> None:
    names = [served.name for served in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"model_uri has two models of the name {name}; clients could not tell them apart."
            )
