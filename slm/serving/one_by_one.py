"""A model that answers in one piece, and one request after the other.

The transformers flavor, and ONNX models of earlier versions of the project.
"""

import atexit
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from slm.serving.errors import ApiError, busy
from slm.serving.inbox import Inbox
from slm_pyfunc.chat import read_message
from slm_pyfunc.engine.scheduler import Events
from slm_pyfunc.interface import NO_MATTER
from slm_pyfunc.parameters import Parameters, RequestError, is_absent

# What MLflow's transformers flavor heeds of a chat; it drops the rest without a word.
PARAMETERS = ("max_tokens", "temperature", "top_p")
HEEDED = {"messages", "max_completion_tokens", *PARAMETERS}
MOST_TOKENS = 2**31 - 1  # where no context length is known; MLflow cannot take more
WAITING = 64  # requests that may wait
LAST_STEP_S = 30  # for which the process waits at its end


@dataclass(eq=False)
class Place:
    """A piece of work in the queue; its outcome goes into the inbox."""

    work: Callable[[], Any]
    inbox: Events
    cancelled: bool = False

    def cancel(self) -> None:
        """It does not begin, or ends after the token that is computed."""
        self.cancelled = True


QUEUES: "weakref.WeakSet[OneByOne]" = weakref.WeakSet()


@atexit.register
def end_all() -> None:
    """A thread that came back from torch while Python ends would abort the process."""
    for queue in list(QUEUES):
        queue.end()


class OneByOne:
    """The queue before a model, and the thread that works it off."""

    def __init__(self, pyfunc: Any) -> None:
        self.pyfunc, self.most_tokens = pyfunc, context_length(pyfunc)
        self.bound_answers()
        self.lock = threading.Lock()  # guards `waiting` and `working`
        self.waiting: deque[Place] = deque()
        self.working: threading.Thread | None = None
        self.place: Place | None = None  # what is being computed
        self.ended = False
        QUEUES.add(self)

    def begin(self, request: dict[str, Any], inbox: Inbox, streamed: bool) -> "WholeAnswer":
        """Queue the answer to a chat; ApiError if a field is wrong, or too many wait."""
        work = partial(self.pyfunc.predict, chat_of(request, self.most_tokens))
        return WholeAnswer(request.get("model"), self.queue(work, inbox))

    def queue(self, work: Callable[[], Any], inbox: Events) -> Place:
        place = Place(work, inbox)
        with self.lock:
            self.waiting = deque(other for other in self.waiting if not other.cancelled)
            if len(self.waiting) >= WAITING:
                raise busy(f"busy: {WAITING} requests wait. Ask again later.", 1)
            self.waiting.append(place)
            if self.working is None:
                self.working = threading.Thread(target=self.work, name="one-by-one", daemon=True)
                self.working.start()
        return place

    def work(self) -> None:
        """Do one piece of work after the other, while there are any."""
        while True:
            with self.lock:
                if self.ended or not self.waiting:
                    self.working = None
                    return
                self.place = place = self.waiting.popleft()
            if place.cancelled:
                continue
            try:
                place.inbox.put((0, place.work()))
            except Exception as error:  # of whatever library: it is this request's
                place.inbox.put((0, error))

    def bound_answers(self) -> None:
        """End answers of a transformers pipeline at its context, and those that nobody waits for.

        By whichever route it is asked.
        """
        model = getattr(self.pyfunc.get_raw_model(), "model", None)
        if model is None:
            return
        generate = model.generate

        def generate_bounded(*args: Any, **options: Any) -> Any:
            prompt = options.get("input_ids", args[0] if args else None)
            room = max(self.most_tokens - (0 if prompt is None else prompt.shape[-1]), 1)
            if (options.get("max_new_tokens") or 0) > room:
                options["max_new_tokens"] = room
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), self.is_over]
            return generate(*args, **options)

        model.generate = generate_bounded

    def is_over(self, ids: Any, scores: Any, **_: Any) -> Any:
        """Whether nobody waits any more, for each row of ids: a stopping criterion."""
        over = self.ended or (self.place is not None and self.place.cancelled)
        return ids.new_full((len(ids),), over).bool()

    def end(self) -> None:
        """Compute nothing more; returns when the token under way is there."""
        self.ended = True
        if (working := self.working) is not None:
            working.join(LAST_STEP_S)


def context_length(pyfunc: Any) -> int:
    """Of a transformers pipeline: an answer past it would keep all others waiting."""
    config = getattr(getattr(pyfunc.get_raw_model(), "model", None), "config", None)
    if config is None:
        return MOST_TOKENS
    return getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS


def chat_of(request: dict[str, Any], most_tokens: int) -> dict[str, Any]:
    """What a request asks of MLflow's transformers flavor; ApiError if it does not serve that."""
    body = {
        name: value
        for name, value in request.items()
        if name not in NO_MATTER
        and not is_absent(value)
        and (value is not False or name in PARAMETERS)
    }
    if body.get("n") == 1:
        del body["n"]
    if unheeded := sorted(body.keys() - HEEDED):
        raise ApiError(
            400,
            f"{unheeded[0]} is not served by this model; valid: {', '.join(sorted(HEEDED))}",
            param=unheeded[0],
        )
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    try:
        return {
            "messages": messages_of(request.get("messages")),
            **parameters_of(body, most_tokens),
        }
    except RequestError as error:
        param = str(error).partition(" ")[0].partition("[")[0]
        raise ApiError(400, str(error), code=error.code, param=param) from error


def messages_of(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {messages!r}; it must be a list of at least one message")
    return [read_message(index, message, None) for index, message in enumerate(messages)]


def parameters_of(body: dict[str, Any], most_tokens: int) -> dict[str, Any]:
    """The parameters that are given, within their limits; RequestError otherwise."""
    given = [name for name in PARAMETERS if name in body]
    parameters = Parameters.of({name: body[name] for name in given})
    if "temperature" in given and parameters.temperature == 0:
        raise RequestError("temperature is 0, and this model samples: give more")
    if (parameters.max_tokens or 0) > most_tokens:
        raise RequestError(
            f"max_tokens is {parameters.max_tokens}; it must be at most {most_tokens}"
        )
    return {name: getattr(parameters, name) for name in given}


class WholeAnswer:
    """What an Answer is to the server, of an answer that comes in one event."""

    n, sequences = 1, ()  # its tokens are known once it is whole

    def __init__(self, model: str | None, place: Place) -> None:
        self.model, self.cancel = model, place.cancel
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
