"""What the interfaces share: the runtime that a logged model's configuration asks for, errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED
from mlflow.pyfunc import PythonModelContext

from .engine.decoder import ExecutionProviderUnavailable
from .engine.runtime import Runtime
from .engine.scheduler import Busy
from .parameters import AT_LOAD, RequestError
from .verify import verify_at_load

log = logging.getLogger(__name__)


def open_runtime(context: PythonModelContext) -> Runtime:
    """Load the model's ONNX folder as its `model_config` says, at load or as it was logged."""
    onnx = Path(context.artifacts["onnx"])
    verify_at_load(onnx.parents[1])
    config = dict(context.model_config)
    config.pop("model_name", None)
    config["defaults"] = {name: config.pop(name) for name in AT_LOAD if name in config}
    if targets := config.pop("targets", None):
        return first_that_runs(onnx, targets, config)
    return Runtime(onnx, **config)


def first_that_runs(onnx: Path, targets: list[list[str]], config: dict[str, Any]) -> Runtime:
    """Load the folder of the first target whose execution provider is there.

    `targets` are pairs of a folder's name and its provider. `execution_provider`, if it is given,
    leaves the targets for it alone. Raises ExecutionProviderUnavailable if none can be loaded.
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


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """A wrong request is HTTP 400 through MLflow's scoring server, a full queue 429.

    What goes wrong in the model is 500.
    """
    try:
        yield
    except RequestError as error:
        raise MlflowException.invalid_parameter_value(str(error)) from error
    except Busy as error:
        raise MlflowException(str(error), error_code=REQUEST_LIMIT_EXCEEDED) from error
    except Exception as error:  # MLflow would call it a bad request
        message = f"{type(error).__name__}: {error}"
        raise MlflowException(message, error_code=INTERNAL_ERROR) from error
