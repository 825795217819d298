"""Errors over HTTP, as OpenAI's API writes them.

https://platform.openai.com/docs/guides/error-codes
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

from mlflow.exceptions import MlflowException

from slm.errors import one_line
from slm.redaction import redacted
from slm_pyfunc.plain import RequestError

log = logging.getLogger("slm.serve")

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """What is answered in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        message, param = encodable(message), param and encodable(param)
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = kind or (INVALID if status < 500 else SERVER)
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


def encodable(text: str) -> str:
    """A text of a request that UTF-8 can spell: JSON may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


class Left(Exception):
    """The client closed its connection: nobody waits for the answer."""


def busy(message: str, retry_after_s: int) -> ApiError:
    return ApiError(
        429,
        message,
        code="rate_limit_exceeded",
        kind="rate_limit_error",
        headers={"Retry-After": str(retry_after_s)},
    )


def not_now(message: str, code: str) -> ApiError:
    """For a while: clients may ask again."""
    return ApiError(503, message, code=code, headers={"Retry-After": "1"})


def took_too_long(limit_s: float) -> ApiError:
    # Clients of OpenAI would repeat a 504 otherwise, and wait as long again.
    return ApiError(
        504,
        f"the answer took longer than serve.timeout_s={limit_s:g}: ask for fewer tokens",
        code="timeout",
        kind="timeout_error",
        headers={"x-should-retry": "false"},
    )


def of_model(error: Exception, fields: Iterable[str], retry_after_s: int) -> ApiError:
    """What a model raised; `fields` are the request's, of which the message may begin with one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):  # found only while the model answered
        return ApiError(400, str(error))
    if not isinstance(error, MlflowException):
        return ApiError(500, f"the model failed: {type(error).__name__}: {one_line(error)}")
    status = error.get_http_status_code()
    if status == 429:
        return busy(error.message, retry_after_s)
    first = re.match(r"\w+", error.message)
    param = first[0] if first and first[0] in {*fields} else None
    code: Any = error.json_kwargs.get("code") if status == 400 else None
    message = redacted(error.message) if status >= 500 else error.message
    return ApiError(status, message, code=code, param=param)


def log_failure(route: str, name: str, error: Exception, told: ApiError) -> None:
    """A model that failed, with its traceback; what a request or the server did is told alone.

    MLflow's scoring server calls some failures bad requests, with the trace of a stack.
    """
    failed = told.status >= 500 or "stack_trace" in getattr(error, "json_kwargs", ())
    if failed and error is not told:
        log.error("%s: %s failed", route, name, exc_info=error)
