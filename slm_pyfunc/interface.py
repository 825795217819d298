"""What the interfaces share: the runtime that a logged model's configuration asks for, errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, REQUEST_LIMIT_EXCEEDED
from mlflow.pyfunc import PythonModelContext

from .engine.runtime import Runtime
from .engine.scheduler import Busy
from .parameters import AT_LOAD, RequestError
from .verify import verify_at_load


def open_runtime(context: PythonModelContext) -> Runtime:
    """Load the model's ONNX folder as its `model_config` says, at load or as it was logged."""
    onnx = Path(context.artifacts["onnx"])
    verify_at_load(onnx.parents[1])
    config = dict(context.model_config)
    config.pop("model_name", None)
    defaults = {name: config.pop(name) for name in AT_LOAD if name in config}
    return Runtime(onnx, defaults=defaults, **config)


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
