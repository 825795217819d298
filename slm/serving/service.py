"""The routes: OpenAI's, MLflow's, and those for whoever watches over the server."""

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from slm.config.use import Serve
from slm.redaction import redacted
from slm.serving.answering import LEFT, Answering
from slm.serving.errors import ApiError, not_now, took_too_long
from slm.serving.guard import Guard, read_body, read_json
from slm.serving.inbox import Courier, Inbox
from slm.serving.metrics import CONTENT_TYPE, Metrics
from slm.serving.models import CHAT, TEXT, Served
from slm.serving.scoring import INVOCATIONS, Scorers, score

# The page may ask this server alone, and run only what is in it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """What the routes share: the models by name, what is under way, the figures."""

    def __init__(self, settings: Serve) -> None:
        self.settings = settings
        self.models: dict[str, Served] = {}
        self.metrics = Metrics()
        self.courier: Courier | None = None
        self.inboxes: set[Inbox] = set()
        self.stopping = False
        self.request_s = 1.0  # how long a request takes, on a moving average
        self.beginners = ThreadPoolExecutor(4, "begin")  # templates, tokens and grammars
        self.scorers = Scorers()

    def add(self, served: Served) -> None:
        """Serve a model, in place of the one that had its name; from the loop's thread."""
        before = self.models.get(served.name)
        self.models[served.name] = served
        if before is not None:
            self.metrics.version.remove(served.name, before.model.model_id)
            before.replace()
        # Last: two versions may be one logged model.
        self.metrics.version.labels(served.name, served.model.model_id).set(1)

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[Inbox]:
        """The inbox of a request under way: it is told when its time is over, or the server's."""
        loop, limit_s = asyncio.get_running_loop(), self.settings.timeout_s
        if self.courier is None:
            self.courier = Courier(loop)
        inbox = Inbox(self.courier)
        alarm = loop.call_later(limit_s, lambda: inbox.receive(took_too_long(limit_s)))
        self.inboxes.add(inbox)
        try:
            yield inbox
        finally:
            alarm.cancel()
            self.inboxes.discard(inbox)

    def find(self, name: Any, route: str) -> Served:
        """The model that a body asks for; the only one if it does not say."""
        if not self.models or self.stopping:
            word = "stops" if self.stopping else "loads its models"
            raise not_now(f"the server {word}: ask again later", "not_ready")
        here = [served for served in self.models.values() if served.route == route]
        if name is None and len(here or self.models) == 1:
            return (here or list(self.models.values()))[0]
        valid = ", ".join(self.models)
        if name is None:
            raise ApiError(400, f"model is missing; it must be one of {valid}", param="model")
        if not isinstance(name, str) or name not in self.models:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; it must be one of {valid}",
                code="model_not_found",
                param="model",
            )
        return self.models[name]

    def retry_after_s(self) -> int:
        return max(1, round(self.request_s))

    def ended(self, served: Served, route: str, status: int, seconds: float) -> None:
        self.metrics.requests.labels(served.name, route, status).inc()
        if status == 200:
            self.metrics.duration.labels(served.name).observe(seconds)
            self.request_s += 0.1 * (seconds - self.request_s)

    def stop(self) -> None:
        """End what is still under way; from the loop's thread."""
        for inbox in list(self.inboxes):
            inbox.receive(not_now("the server stops: ask again later", "server_stops"))


def application(service: Service) -> "Guard":
    """The ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = (resources.files("slm.serving") / "page.html").read_bytes()

    async def answer(request: Request, route: str) -> Response:
        body = read_json(await read_body(request, service.settings.max_body_mb))
        served = service.find(body.get("model"), route)
        if served.route != route:
            raise ApiError(400, f"{served.name} answers {served.route}, not {route}", param="model")
        return Answering(service, served, body)

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await answer(request, CHAT)

    @app.post(TEXT)
    async def text(request: Request) -> Response:
        return await answer(request, TEXT)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(model) for model in service.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return described(service.find(name, CHAT))

    @app.post(INVOCATIONS)
    async def invocations(request: Request) -> Response:
        data = await read_body(request, service.settings.max_body_mb)
        return await score(service, data, request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def ready() -> Response:
        if not service.models or service.stopping:
            raise not_now("the server loads its models, or stops", "not_ready")
        return Response("\n", media_type="application/json")  # as MLflow's /ping has it

    app.get("/ready")(ready)
    app.get("/ping")(ready)

    @app.get("/version")
    async def version() -> Response:
        import mlflow

        return Response(mlflow.__version__, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        runtimes = {served.name: served.runtime for served in service.models.values()}
        service.metrics.count_sequences(runtimes)
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/")
    async def try_it() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=LEFT)  # to nobody: it left before its body was here

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        told = ApiError(500, f"the server failed: {type(error).__name__}")
        return JSONResponse(told.body, told.status)

    return Guard(app, service.settings)


def described(served: Served) -> dict[str, Any]:
    """A model as OpenAI lists it, and where it is."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "slm",
        "interface": served.model.interface,
        "uri": redacted(served.uri),
        "logged_model": served.model.model_id,
    }
