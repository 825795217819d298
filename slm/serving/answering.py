"""One answer over HTTP, whole or as server-sent events, until it ends or its client leaves."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response

from slm.serving.errors import ApiError, Left, of_model, took_too_long
from slm.serving.inbox import Inbox
from slm.serving.models import Served

if TYPE_CHECKING:
    from slm.serving.service import Service

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
SILENCE_S = 15.0  # after which a stream that waits says that it is alive
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
        service = self.service
        served = self.served = service.models[self.served.name]  # it may have been replaced
        loop = asyncio.get_running_loop()
        inbox = service.inbox()
        self.start, self.first = time.monotonic(), 0.0
        limit_s = service.settings.timeout_s
        alarm = loop.call_later(limit_s, lambda: inbox.receive(took_too_long(limit_s)))
        watch = loop.create_task(watch_client(receive, inbox))
        service.inboxes.add(inbox)
        answer: Any = None
        self.begun, status = False, 200
        with served.in_use():
            try:
                answer = await loop.run_in_executor(
                    service.beginners, served.begin, self.asked, inbox, self.streamed
                )
                if self.streamed:
                    await self.stream(answer, inbox, send)
                else:
                    await self.collect(answer, inbox)
                    await JSONResponse(answer.whole())(scope, receive, send)
                self.count(answer)
            except (Left, OSError):  # OSError: the connection broke while it was written to
                status = 499  # nginx's number for it
            except Exception as error:
                told = of_model(error, {*self.asked, served.field}, service.retry_after_s())
                status = told.status
                await self.tell(told, scope, receive, send)
            finally:
                alarm.cancel()
                watch.cancel()
                service.inboxes.discard(inbox)
                if answer is not None:
                    answer.cancel()
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
        """What came of the answer; raises what ended it."""
        events = await inbox.take(SILENCE_S)
        for event in events:
            error = event if isinstance(event, Exception) else event[1]
            if isinstance(error, Exception):
                raise error
        if events and not self.first:
            self.first = time.monotonic()
        return events

    async def tell(self, error: ApiError, scope: Message, receive: Receive, send: Send) -> None:
        """The error in place of the answer, or as the last event of a stream."""
        if not self.begun:
            return await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        await send({"type": "http.response.body", "body": data(error.body), "more_body": False})

    def count(self, answer: Any) -> None:
        metrics, name, usage = self.service.metrics, self.served.name, answer.usage()
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        metrics.prompt_tokens.labels(name).inc(usage["prompt_tokens"])
        metrics.cached_tokens.labels(name).inc(cached)
        metrics.cache_hits.labels(name).inc(bool(cached))
        metrics.generated_tokens.labels(name).inc(usage["completion_tokens"])
        if self.streamed:
            metrics.first_token.labels(name).observe(self.first - self.start)
            took = time.monotonic() - self.first
            if usage["completion_tokens"] > 1 and took > 0:
                metrics.speed.labels(name).observe((usage["completion_tokens"] - 1) / took)


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
