"""Who may ask, and what is read of a request."""

import asyncio
import hmac
import json
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from slm.config.use import Serve
from slm.errors import InputError, one_line
from slm.serving.errors import ApiError

log = logging.getLogger("slm.serve")

API_KEY = "SLM_API_KEY"  # the environment variable of the key that clients have to send
OPEN = ("/", "/health", "/ready", "/ping", "/metrics", "/version")  # without a key
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_S = 60  # seconds in which a request's body has to arrive

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def api_key() -> bytes:
    """The key that clients have to send, b"" for none; InputError if it is set and blank."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise InputError(
            f"{API_KEY} is set, and holds no key: anybody could ask. Give it one, or unset it."
        )
    return (key or "").strip().encode()


class Guard:
    """Lets in who may ask, and logs a fault without what is secret in it."""

    def __init__(self, app: FastAPI, settings: Serve) -> None:
        self.app, self.key = app, api_key()
        self.is_local = is_loopback(settings.host)

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
        if self.is_local:
            # A page of another site, at its own address or by a name of its own for this one.
            origin = headers.get(b"origin", b"").decode("latin-1")
            address = f"//{headers.get(b'host', b'127.0.0.1').decode('latin-1')}"
            for found in filter(None, (origin, address)):
                if not is_loopback(host_of(found)):
                    asked = found.removeprefix("//")
                    return ApiError(403, f"the server answers for 127.0.0.1, not for {asked}")
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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    return host.strip("[]") in LOOPBACK


def host_of(address: str) -> str:
    """The host of scheme://host:port; "" if there is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


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
