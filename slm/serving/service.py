"""The routes: OpenAI's, MLflow's, and those for whoever watches over the server."""

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from mlflow.exceptions import MlflowException
from starlette.exceptions import HTTPException

from slm.config.use import Serve
from slm.errors import one_line
from slm.redaction import redacted
from slm.serving.answering import Answering
from slm.serving.errors import ApiError, not_now
from slm.serving.inbox import Courier, Inbox, in_daemon
from slm.serving.metrics import CONTENT_TYPE, Metrics
from slm.serving.models import Served

log = logging.getLogger("slm.serve")

API_KEY = "SLM_API_KEY"  # the environment variable of the key that clients have to send
OPEN = ("/", "/health", "/ready", "/ping", "/metrics", "/version")  # without a key
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY_S = 60  # seconds in which a request's body has to arrive
CHAT, TEXT, INVOCATIONS = "/v1/chat/completions", "/v1/completions", "/invocations"
# The page may ask this server alone, and run only what is in it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
        self.scorers = asyncio.Semaphore(128)

    def add(self, served: Served) -> None:
        """Serve a model, in place of the one that had its name; from the loop's thread."""
        before = self.models.get(served.name)
        self.models[served.name] = served
        self.metrics.version.labels(served.name, served.model.model_id).set(1)
        if before is not None:
            self.metrics.version.remove(served.name, before.model.model_id)
            before.replace()

    def inbox(self) -> Inbox:
        if self.courier is None:
            self.courier = Courier(asyncio.get_running_loop())
        return Inbox(self.courier)

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
        for served in service.models.values():
            if served.runtime is not None and served.runtime.loaded:
                scheduler = served.runtime.scheduler
                service.metrics.running.labels(served.name).set(len(scheduler.open))
                service.metrics.waiting.labels(served.name).set(len(scheduler.waiting))
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/")
    async def try_it() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        told = ApiError(500, f"the server failed: {type(error).__name__}")
        return JSONResponse(told.body, told.status)

    return Guard(app, service)


class Guard:
    """Lets in who may ask, and logs a fault without what is secret in it."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self.app, self.service = app, service
        self.key = os.environ.get(API_KEY, "").encode()
        self.is_local = service.settings.host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if error := self.refusal(scope["path"], headers):
            return await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        except Exception:  # it was answered by `fault`, if nothing was before
            log.exception("%s %s failed", scope["method"], scope["path"])

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.is_local:  # a page of another site, by a name of its own for this address
            host = headers.get(b"host", b"127.0.0.1").decode("latin-1").rpartition(":")
            if (host[0] or host[2]) not in LOOPBACK and "".join(host) not in LOOPBACK:
                return ApiError(403, f"the server answers for 127.0.0.1, not for {''.join(host)}")
        if not self.key or path in OPEN:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key):
            return None
        return ApiError(
            401,
            "the API key is missing or wrong: send it as Authorization: Bearer <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def read_body(request: Request, max_mb: float) -> bytes:
    """The body of a request; ApiError if it is too large, or does not arrive."""
    too_large = ApiError(413, f"the body is larger than serve.max_body_mb={max_mb:g}")
    limit = int(max_mb * 1e6)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive in {BODY_S} s") from error
    return bytes(body)


def read_json(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError as error:  # UnicodeDecodeError too
        raise ApiError(400, f"the body is no JSON: {one_line(error)}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deep") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


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


async def score(service: Service, data: bytes, request: Request) -> Response:
    """What MLflow's scoring server answers, by its own code; ?model= tells several apart."""
    from mlflow.pyfunc import scoring_server

    served = service.find(request.query_params.get("model"), "")
    start = time.monotonic()
    content_type = request.headers.get("content-type", "")
    with served.in_use():
        model = served.pyfunc
        schema = model.metadata.get_input_schema()
        arguments = data, content_type, model, schema
        try:
            async with service.scorers:
                result = await in_daemon(scoring_server.invocations, *arguments)
            response = Response(result.response, result.status, media_type=result.mimetype)
        except MlflowException as error:
            status = error.get_http_status_code()
            response = Response(
                redacted(error.serialize_as_json()), status, media_type="application/json"
            )
            if status == 429:
                response.headers["Retry-After"] = str(service.retry_after_s())
    service.ended(served, INVOCATIONS, response.status_code, time.monotonic() - start)
    return response
