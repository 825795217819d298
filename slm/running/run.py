"""Run a step: its MLflow run, and its outcome in the work folder, made or reused.

run_step("export_onnx", config, OnnxModel, key={…}, module=__name__, make=lambda folder: …)
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow

from slm.config import Config
from slm.running.tracking import log_parameters, mlflow_run
from slm.running.work import Outcome, T, keep

log = logging.getLogger("slm.run")


def run_step(
    name: str,
    config: Config,
    outcome: type[T],
    *,
    key: dict[str, Any],
    make: Callable[[Path], T],
    still_there: Callable[[T], bool] = lambda _: True,
    publish: Callable[[T], None] = lambda _: None,
    module: str | None = None,
) -> T:
    """Make or reuse the step's outcome (slm/running/work.py) in an MLflow run of its own.

    `publish` logs what belongs on the run, whether the outcome was made or reused. `module` is
    where the step's code begins, by default the entry point's file.
    """
    with mlflow_run(name):
        log_parameters(name, config)
        start = time.monotonic()
        kept = keep(
            name,
            config.paths.work,
            outcome,
            key=key,
            module=module or f"steps.{name}",
            make=make,
            still_there=still_there,
        )
        seconds, result = time.monotonic() - start, kept.outcome
        how = "reused" if kept.reused else "done"
        log.info("%s: %s in %.1f s: %s", name, how, seconds, result.uri)
        mlflow.set_tags({"reused": str(kept.reused).lower(), "key": kept.key})
        mlflow.log_metrics({"duration_s": seconds, **numbers(result)})
        publish(result)
        mlflow.log_artifact(str(kept.folder / "result.json"))
    return result


def numbers(result: Outcome) -> dict[str, float]:
    """The outcome's numbers, as metrics."""
    return {
        name: float(value)
        for name in result.__dataclass_fields__
        if isinstance(value := getattr(result, name), (int, float)) and not isinstance(value, bool)
    }
