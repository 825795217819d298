"""How the stand-in for Databricks reads a request, and refuses it as Databricks does."""

import json
from typing import Any, NoReturn

from flask import Response, request
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode


def asked() -> dict[str, Any]:
    """What a request asks for, in its query or its body: some clients send a body with a GET."""
    return {**request.args.to_dict(), **(request.get_json(silent=True) or {})}


def refuse(code: str, message: str) -> NoReturn:
    raise MlflowException(message, error_code=ErrorCode.Value(code))


def refusal(error: MlflowException) -> Response:
    body = json.dumps({"error_code": error.error_code, "message": error.message})
    return Response(body, error.get_http_status_code(), mimetype="application/json")
