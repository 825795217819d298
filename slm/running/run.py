"""Run a step: its MLflow run, and its outcome in the work folder, made or reused.

run_step("export_onnx", config, OnnxModel, key={…}, module=__name__, make=lambda folder: …)
"""

import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import mlflow

from slm.config import Config
from slm.running.tracking import log_parameters, mlflow_run
from slm.running.work import Outcome, T, keep

log = logging.getLogger("slm.run")

# Whether steps that are called may only reuse what is there.
ONLY_KEPT: ContextVar[bool] = ContextVar("only_kept", default=False)


def run_step(
    name: str,
    config: Config,
    outcome: type[T],
    *,
    key: dict[str, Any],
    make: Callable[[Path], T],
    still_there: Callable[[T], bool] = lambda _: True,
    publish: Callable[[T, bool], None] = lambda *_: None,
    module: str | None = None,
) -> T:
    """Make or reuse the step's outcome (slm/running/work.py) in an MLflow run of its own.

    `publish` logs what belongs on the run, and is told whether the outcome was reused. `module` is
    where the step's code begins, by default the entry point's file. NotKept, before there is a run,
    if the outcome is not there and ONLY_KEPT says so.
    """
    kept_or_made = partial(
        keep,
        name,
        config.paths.work,
        outcome,
        key=key,
        module=module or f"steps.{name}",
        make=make,
        still_there=still_there,
    )
    start = time.monotonic()
    kept = kept_or_made(only_kept=True) if ONLY_KEPT.get() else None
    with mlflow_run(name):
        log_parameters(name, config)
        kept = kept or kept_or_made()
        seconds, result = time.monotonic() - start, kept.outcome
        how = "reused" if kept.reused else "done"
        log.info("%s: %s in %.1f s: %s", name, how, seconds, result.uri)
        mlflow.set_tags({"reused": str(kept.reused).lower(), "key": kept.key})
        mlflow.log_metrics({"duration_s": seconds, **numbers(result)})
        publish(result, kept.reused)
        mlflow.log_artifact(str(kept.folder / "result.json"))
    return result


def numbers(result: Outcome) -> dict[str, float]:
    """The outcome's numbers, as metrics."""
    return {
        name: float(value)
        for name in result.__dataclass_fields__
        if isinstance(value := getattr(result, name), (int, float)) and not isinstance(value, bool)
    }
