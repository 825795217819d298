"""One answer over HTTP, whole or as server-sent events, until it ends or its client leaves."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response

from slm.serving.errors import ApiError, Left, log_failure, of_model
from slm.serving.inbox import Inbox
from slm.serving.models import Served

if TYPE_CHECKING:
    from slm.serving.service import Service

LEFT = 499  # nginx's status for a client that left
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold it back

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Answering(Response):
    """The response to one body: it asks the model, and gives up if nobody listens any more."""

    def __init__(self, service: "Service", served: Served, body: dict[str, Any]) -> None:
        super().__init__()
        self.service, self.served = service, served
        self.asked = {**body, "model": served.name}
        self.streamed = flag(body, "stream")
        self.counts_usage = self.streamed and flag(
            body.get("stream_options") or {}, "include_usage"
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        service, send = self.service, heard(send)
        served = self.served = service.models[self.served.name]  # it may have been replaced
        loop = asyncio.get_running_loop()
        self.start, self.began = time.monotonic(), dict[int, float]()  # by choice
        answer: Any = None
        self.begun, status = False, LEFT
        with served.in_use(), service.awaiting() as inbox:
            watch = loop.create_task(watch_client(receive, inbox))
            try:
                answer = await loop.run_in_executor(
                    service.beginners, served.begin, self.asked, inbox, self.streamed
                )
                if self.streamed:
                    await self.stream(answer, inbox, send)
                else:
                    await self.collect(answer, inbox)
                    await JSONResponse(answer.whole())(scope, receive, send)
                status = 200
            except Left:
                pass
            except Exception as error:
                told = of_model(error, {*self.asked, served.field}, service.retry_after_s())
                status = told.status
                log_failure(served.route, served.name, error, told)
                with contextlib.suppress(Left):
                    await self.tell(told, scope, receive, send)
            finally:
                watch.cancel()
                if answer is not None:
                    answer.cancel()
                    self.count(answer)
                service.ended(served, served.route, status, time.monotonic() - self.start)

    async def collect(self, answer: Any, inbox: Inbox) -> None:
        while not answer.is_whole:
            for event in await self.take(inbox):
                answer.take(*event)

    async def stream(self, answer: Any, inbox: Inbox, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers += [(name.lower().encode(), value.encode()) for name, value in SSE.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.begun = True
        while not answer.is_whole:
            events = await self.take(inbox)
            chunks = [chunk for event in events for chunk in answer.take(*event)]
            if self.counts_usage:
                chunks = [{**chunk, "usage": None} for chunk in chunks]
            parts = [data(chunk) for chunk in chunks]
            if not events:
                parts.append(b": still there\n\n")
            if answer.is_whole:
                if self.counts_usage:
                    parts.append(data({**answer.head, "choices": [], "usage": answer.usage()}))
                parts.append(b"data: [DONE]\n\n")
            if body := b"".join(parts):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def take(self, inbox: Inbox) -> list[Any]:
        """What came of the answer, and how fast; raises what ended it."""
        events = await inbox.take()
        metrics, name, now = self.service.metrics, self.served.name, time.monotonic()
        if self.streamed and events and not self.began:
            metrics.first_token.labels(name).observe(now - self.start)
        for choice, event in events:
            took = now - self.began.setdefault(choice, now)
            tokens = getattr(event, "completion_tokens", 0)  # of a Completion
            if self.streamed and tokens > 1 and took > 0:
                metrics.speed.labels(name).observe((tokens - 1) / took)
        return events

    async def tell(self, error: ApiError, scope: Message, receive: Receive, send: Send) -> None:
        """The error in place of the answer, or as the last event of a stream."""
        if not self.begun:
            return await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        await send({"type": "http.response.body", "body": data(error.body), "more_body": False})

    def count(self, answer: Any) -> None:
        """The tokens that were computed, also of an answer that nobody got."""
        metrics, name = self.service.metrics, self.served.name
        usage = answer.usage() if answer.is_whole else usage_so_far(answer)
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        metrics.prompt_tokens.labels(name).inc(usage["prompt_tokens"])
        metrics.cached_tokens.labels(name).inc(cached)
        metrics.cache_hits.labels(name).inc(bool(cached))
        metrics.generated_tokens.labels(name).inc(usage["completion_tokens"])


def usage_so_far(answer: Any) -> dict[str, Any]:
    """The usage of an answer that was given up: of its prompts, those that were read."""
    read = [sequence for sequence in answer.sequences[:: answer.n] if sequence.generated]
    return {
        "prompt_tokens": sum(len(sequence.prompt) for sequence in read),
        "completion_tokens": sum(sequence.generated for sequence in answer.sequences),
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in read)},
    }


def flag(values: Any, name: str) -> bool:
    value = values.get(name) if isinstance(values, dict) else None
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} is {value!r}; it must be true or false", param=name)
    return bool(value)


def data(value: dict[str, Any]) -> bytes:
    """A server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"data: %b\n\n" % encode(value).encode()


async def watch_client(receive: Receive, inbox: Inbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.receive(Left())


def heard(send: Send) -> Send:
    """`send`, which raises Left if the connection broke.

    OSErrors of the model, for lack of memory say, are no client's that left.
    """

    async def send_or_leave(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise Left from error

    return send_or_leave
