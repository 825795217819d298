"""The models that a server serves, each a logged model that was loaded and has answered."""

import contextlib
import gc
import logging
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections import deque
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
from slm.running.tracking import local_path
from slm.seal import require_signed
from slm.serving.errors import ApiError, busy
from slm.serving.inbox import Inbox
from slm_pyfunc.interface import NO_MATTER
from slm_pyfunc.parameters import is_absent

log = logging.getLogger("slm.serve")

QUESTION = "Say yes."  # the first thing that a model is asked
# What MLflow's transformers flavor heeds of a chat; it drops the rest without a word.
HEEDED = {"messages", "max_tokens", "max_completion_tokens", "temperature", "top_p"}
WAITING = 64  # requests that may wait for a model that answers one by one


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
    downloads: Path
    version: str = ""  # of the registered model, if an alias named it
    resident_mb: float = 0.0  # what the process took up for it
    created: int = field(default_factory=lambda: int(time.time()))
    under_way: int = 0
    replaced: bool = False

    def __post_init__(self) -> None:
        python_model = None
        if self.model.is_onnx:
            python_model = self.pyfunc.unwrap_python_model()
        self.runtime = getattr(python_model, "runtime", None)
        self.streams = hasattr(python_model, "begin")
        self.asked: Any = python_model if self.streams else OneByOne(self.pyfunc)

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self.model.interface == "chat" else "/v1/completions"

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
            self.pyfunc = self.asked = self.runtime = None
            threading.Thread(target=self.free, name="free", daemon=True).start()

    def free(self) -> None:
        gc.collect()
        shutil.rmtree(self.downloads, ignore_errors=True)


def load(uri: str, signing: Signing, settings: dict[str, Any]) -> Served:
    """Download, verify and load a model, and have it answer."""
    start, before = time.monotonic(), rss_mb()
    downloads = Path(tempfile.mkdtemp(prefix="slm-serve-"))
    try:
        pinned, version = pinned_uri(uri)
        folder = local_path(pinned, "model_uri", "register", downloads)
        model = LoggedModel.load(str(folder))
        require_signed([str(folder)], signing)
        own = settings if model.is_onnx else {}
        pyfunc = mlflow.pyfunc.load_model(str(folder), suppress_warnings=True, model_config=own)
        served = Served(name_of(uri, model), uri, model, pyfunc, downloads, version)
        served.answer()
        served.resident_mb = rss_mb() - before
    except BaseException:
        shutil.rmtree(downloads, ignore_errors=True)
        raise
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


class OneByOne:
    """A chat model that answers in one piece, and one request after the other.

    The transformers flavor, and ONNX models of earlier versions of the project.
    """

    def __init__(self, pyfunc: Any) -> None:
        self.pyfunc = pyfunc
        self.lock = threading.Lock()  # guards `waiting` and `working`
        self.waiting: deque[tuple[dict[str, Any], Inbox, WholeAnswer]] = deque()
        self.working = False

    def begin(self, request: dict[str, Any], inbox: Inbox, streamed: bool) -> "WholeAnswer":
        body = {
            name: value
            for name, value in request.items()
            if name not in NO_MATTER and not is_absent(value) and value is not False
        }
        if body.get("n") == 1:
            del body["n"]
        if unheeded := sorted(body.keys() - HEEDED):
            raise ApiError(
                400,
                f"{unheeded[0]} is not served by this model; valid: {', '.join(sorted(HEEDED))}",
                param=unheeded[0],
            )
        if body.get("temperature") == 0:
            raise ApiError(
                400, "temperature is 0, and this model samples: give more", param="temperature"
            )
        if "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
        answer = WholeAnswer(request.get("model"))
        with self.lock:
            if len(self.waiting) >= WAITING:
                raise busy(f"busy: {WAITING} requests wait. Ask again later.", 1)
            self.waiting.append((body, inbox, answer))
            if not self.working:
                self.working = True
                threading.Thread(target=self.work, name="one-by-one", daemon=True).start()
        return answer

    def work(self) -> None:
        """Answer one after the other, while there are any."""
        while True:
            with self.lock:
                if not self.waiting:
                    self.working = False
                    return
                body, inbox, answer = self.waiting.popleft()
            if answer.cancelled:
                continue
            try:
                inbox.put((0, self.pyfunc.predict(body)))
            except Exception as error:  # of whatever library: it is this request's
                inbox.put((0, error))


class WholeAnswer:
    """What an Answer is to the server, of an answer that comes in one event."""

    def __init__(self, model: str | None) -> None:
        self.model, self.cancelled = model, False
        self.completion: dict[str, Any] = {}

    @property
    def is_whole(self) -> bool:
        return bool(self.completion)

    def take(self, choice: int, event: Any) -> list[dict[str, Any]]:
        completion = event[0] if isinstance(event, list) else event
        self.completion = {**completion, "id": f"chatcmpl-{uuid.uuid4().hex}"}
        self.completion["model"] = self.model or completion["model"]
        chunk = {**self.completion, "object": "chat.completion.chunk"}
        del chunk["usage"]
        chunk["choices"] = [
            {"index": c["index"], "delta": c["message"], "finish_reason": c["finish_reason"]}
            for c in completion["choices"]
        ]
        return [chunk]

    def whole(self) -> dict[str, Any]:
        return self.completion

    def usage(self) -> dict[str, Any]:
        return self.completion["usage"]

    @property
    def head(self) -> dict[str, Any]:
        names = ("id", "created", "model")
        kept = {name: self.completion[name] for name in names}
        return {**kept, "object": "chat.completion.chunk"}

    def cancel(self) -> None:
        """It does not begin, if it has not; what is computed is computed to its end."""
        self.cancelled = True


def require_distinct(models: list[Served]) -> None:
    names = [served.name for served in models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"model_uri has two models of the name {name}; clients could not tell them apart."
            )
