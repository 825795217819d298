"""What both interfaces share: loading a logged model's runtime, answers on their way, errors."""

import difflib
import json
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED
from mlflow.pyfunc import PythonModelContext

from .engine.decoder import ExecutionProviderUnavailable
from .engine.runtime import Runtime, require_digests
from .engine.scheduler import Busy, Completion, Sequence
from .parameters import AT_LOAD, Parameters, RequestError, is_absent
from .plain import require_text
from .verify import verify_at_load

log = logging.getLogger(__name__)

# Of this process: interfaces of the same ONNX model, loaded with the same settings, share one.
SHARED: "weakref.WeakValueDictionary[str, Runtime]" = weakref.WeakValueDictionary()
SHARING = threading.Lock()
# Fields of OpenAI's requests that do not shape an answer here.
NO_MATTER = {
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "stream", "stream_options"),
}


def open_runtime(context: PythonModelContext) -> Runtime:
    """Load the model's ONNX folder as its `model_config` says, at load or as it was logged."""
    onnx = Path(context.artifacts["onnx"])
    verify_at_load(onnx.parents[1])
    config = dict(context.model_config)
    for own in ("model_name", "tool_calls"):
        config.pop(own, None)
    if not config.get("sha256"):
        return load_runtime(onnx, config)
    key = json.dumps(config, sort_keys=True)
    with SHARING:
        if (runtime := SHARED.get(key)) is not None:
            for folder, digests in digests_of(onnx, config["sha256"]).items():
                require_digests(folder, digests)
            return runtime
        runtime = SHARED[key] = load_runtime(onnx, config)
    return runtime


def digests_of(onnx: Path, sha256: dict[str, Any]) -> dict[Path, dict[str, str]]:
    """The digests of the files of each folder: of one ONNX model, or of several targets'."""
    if all(isinstance(digest, str) for digest in sha256.values()):
        return {onnx: sha256}
    return {onnx / name: digests for name, digests in sha256.items()}


def load_runtime(onnx: Path, config: dict[str, Any]) -> Runtime:
    """Load an ONNX folder, or that of the first of several targets that runs here."""
    config["defaults"] = {name: config.pop(name) for name in AT_LOAD if name in config}
    if targets := config.pop("targets", None):
        return first_that_runs(onnx, targets, config)
    return Runtime(onnx, **config)


def first_that_runs(onnx: Path, targets: list[list[str]], config: dict[str, Any]) -> Runtime:
    """Load the folder of the first target whose execution provider is there.

    `targets` are pairs of a folder's name and its provider. If `execution_provider` is given, only
    its own targets are tried. Raises ExecutionProviderUnavailable if none can be loaded.
    """
    asked, sha256 = config.pop("execution_provider"), config.pop("sha256")
    fitting = [(name, own) for name, own in targets if asked in (None, own)]
    if not fitting:
        known = ", ".join(dict.fromkeys(own for _, own in targets))
        raise ValueError(f"execution_provider is {asked!r}; this model has targets for {known}")
    absent = []
    for name, provider in fitting:
        try:
            runtime = Runtime(onnx / name, provider, sha256=sha256[name], **config)
        except ExecutionProviderUnavailable as error:
            log.warning("not served for the target %s: %s", name, error)
            absent.append(f"{name}: {error}")
            continue
        log.info("served for the target %s", name)
        return runtime
    raise ExecutionProviderUnavailable("; ".join(absent))


class Form(Protocol):
    """How the pieces of an answer are written: a chat completion's, or a text completion's."""

    def choice(self, completion: Completion) -> dict[str, Any]:
        """A choice of the whole answer, without its index."""

    def pieces(self, sequence: Sequence, event: str | Completion) -> list[dict[str, Any]]:
        """The choices of an event's chunks, without their index; there may be none."""


@dataclass
class Answer:
    """The answer to one request on its way.

    `take` makes chunks of each event of its sequences; `whole` is the answer in one piece once all
    have ended (`is_whole`). `head` holds the first fields of each: id, object, created, model.
    """

    form: Form
    head: dict[str, Any]
    n: int  # answers to each prompt
    sequences: list[Sequence]
    ended: dict[int, Completion] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return len(self.ended) == len(self.sequences)

    def take(self, choice: int, event: str | Completion) -> list[dict[str, Any]]:
        """The chunks of a piece of text, or of the end of a choice."""
        if isinstance(event, Completion):
            self.ended[choice] = event
        pieces = self.form.pieces(self.sequences[choice], event)
        return [{**self.head, "choices": [{"index": choice, **piece}]} for piece in pieces]

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": index, **self.form.choice(self.ended[index])} for index in sorted(self.ended)
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt counts once, whatever `n` is."""
        completions = [self.ended[index] for index in sorted(self.ended)]
        prompt = sum(completion.prompt_tokens for completion in completions[:: self.n])
        cached = sum(completion.cached_tokens for completion in completions[:: self.n])
        generated = sum(completion.completion_tokens for completion in completions)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def cancel(self) -> None:
        """Give up: the rows are free before the next token is computed."""
        for sequence in self.sequences:
            sequence.cancelled = True


def header(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What each object of an answer begins with."""
    created = int(time.time())
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": created,
        "model": model,
    }


def require_known(request: Mapping[str, Any], *own: str) -> None:
    """Raise RequestError for an unknown field: a misspelt one would have no effect."""
    parameters = {parameter.name for parameter in fields(Parameters)} - {"schema"}
    known = parameters | NO_MATTER | {*own, "response_format"}
    for name, value in request.items():
        if name not in known and not is_absent(value) and value is not False:
            require_text("the name of a field", name)
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; is it {near[0]}?" if near else ""
            raise RequestError(f"{name} is no field that this model serves{hint}")


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """A wrong request is HTTP 400 through MLflow's scoring server, a full queue 429.

    What goes wrong in the model is 500.
    """
    try:
        yield
    except RequestError as error:
        raise MlflowException.invalid_parameter_value(str(error), code=error.code) from error
    except Busy as error:
        raise MlflowException(str(error), error_code=REQUEST_LIMIT_EXCEEDED) from error
    except Exception as error:  # MLflow would call it a bad request
        message = f"{type(error).__name__}: {error}"
        raise MlflowException(message, error_code=INTERNAL_ERROR) from error
