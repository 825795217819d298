"""/invocations: MLflow's own code answers, within the limits of this server."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response
from mlflow.exceptions import MlflowException

from slm.redaction import redacted
from slm.serving.errors import busy, log_failure, of_model
from slm.serving.inbox import Inbox
from slm.serving.models import Served

if TYPE_CHECKING:
    from slm.serving.service import Service

INVOCATIONS = "/invocations"
AT_ONCE = 128  # requests, each of which takes a thread


class Scorers:
    """Threads that score; each goes on to its end, also if nobody waits for it any more."""

    def __init__(self) -> None:
        self.free = threading.Semaphore(AT_ONCE)

    def begin(self, work: Callable[[], Any], inbox: Inbox) -> None:
        """Do the work in a thread that keeps no process from ending; ApiError if too many do."""
        if not self.free.acquire(blocking=False):
            raise busy(f"busy: {AT_ONCE} requests are being scored. Ask again later.", 1)

        def run() -> None:
            try:
                inbox.put((0, work()))
            except Exception as error:  # it is this request's
                inbox.put((0, error))
            finally:
                self.free.release()

        threading.Thread(target=run, name="scorer", daemon=True).start()


async def score(service: "Service", data: bytes, request: Request) -> Response:
    """What MLflow's scoring server answers; ?model= tells several models apart."""
    from mlflow.pyfunc import scoring_server

    served = service.find(request.query_params.get("model"), "")
    start, status = time.monotonic(), 500
    schema = served.pyfunc.metadata.get_input_schema()
    content_type = request.headers.get("content-type", "")
    work = partial(scoring_server.invocations, data, content_type, served.pyfunc, schema)
    try:
        result = await scored(service, served, work)
        status = result.status
        return Response(result.response, status, media_type=result.mimetype)
    except Exception as error:
        told = of_model(error, (), service.retry_after_s())
        status = told.status
        log_failure(INVOCATIONS, served.name, error, told)
        if not isinstance(error, MlflowException):
            raise told from None
        body = redacted(error.serialize_as_json())
        return Response(body, status, told.headers, media_type="application/json")
    finally:
        service.ended(served, INVOCATIONS, status, time.monotonic() - start)


async def scored(service: "Service", served: Served, work: Callable[[], Any]) -> Any:
    """What the work returns or raises; ApiError if too much waits, or it takes too long."""
    with served.in_use(), service.awaiting() as inbox:
        if served.model.is_onnx:
            service.scorers.begin(work, inbox)
            return await outcome(inbox)
        place = served.asked.queue(work, inbox)
        try:
            return await outcome(inbox)
        finally:
            place.cancel()


async def outcome(inbox: Inbox) -> Any:
    while not (events := await inbox.take()):
        pass
    return events[0][1]
