"""Run a step: its MLflow run, and its outcome in the work folder, made or reused.

run_step("export_onnx", config, OnnxModel, key={…}, module=__name__, make=lambda folder: …)
"""

import enum
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import mlflow

from slm.config import Config
from slm.running.summary import note_step
from slm.running.tracking import TEXT_LIMIT, log_parameters, mlflow_run
from slm.running.work import RESULT, Outcome, T, keep, touch, work_folder

log = logging.getLogger("slm.run")


class Ask(enum.Enum):
    """What a step that is called may do."""

    run = enum.auto()  # make its outcome, or reuse it
    reuse = enum.auto()  # reuse it, in an MLflow run of its own; NotKept if it is not there
    look = enum.auto()  # return it, and leave no trace; NotKept if it is not there


ASKED: ContextVar[Ask] = ContextVar("asked", default=Ask.run)


def run_step(
    name: str,
    config: Config,
    outcome: type[T],
    *,
    key: dict[str, Any],
    make: Callable[[Path], T],
    stale: Callable[[T], str] = lambda _: "",
    publish: Callable[[T, bool], None] = lambda *_: None,
    module: str | None = None,
) -> T:
    """Make or reuse the step's outcome (slm/running/work.py) in an MLflow run of its own.

    `publish` logs what belongs on the run, and is told whether the outcome was reused. `module` is
    where the step's code begins, by default the entry point's file. ASKED may forbid to make it.
    """
    kept_or_made = partial(
        keep,
        name,
        config.paths.work,
        outcome,
        key=key,
        module=module or f"steps.{name}",
        make=make,
        stale=stale,
        of={"model": config.model.name, "target": config.target.name},
        again=name in config.force,
    )
    start, asked = time.monotonic(), ASKED.get()
    kept = None if asked is Ask.run else kept_or_made(only_kept=True)
    if kept is not None and asked is Ask.look:
        return kept.outcome
    with mlflow_run(name, work_folder(config.paths.work)) as run:
        log_parameters(name, config)
        if kept is None:
            kept = kept_or_made()
        else:
            touch(kept.folder)
        seconds, result = time.monotonic() - start, kept.outcome
        how = "reused" if kept.reused else "done"
        log.info("%s: %s in %.1f s: %s", name, how, seconds, result.uri)
        why = {"why": kept.why[:TEXT_LIMIT]} if kept.why else {}
        mlflow.set_tags({"reused": str(kept.reused).lower(), "key": kept.key, **why})
        mlflow.log_metrics({"duration_s": seconds, **numbers(result)})
        publish(result, kept.reused)
        mlflow.log_artifact(str(kept.folder / RESULT))
    note_step(name, result, seconds, kept.why, run.info.run_id)
    return result


def numbers(result: Outcome) -> dict[str, float]:
    """The outcome's numbers, as metrics."""
    return {
        name: float(value)
        for name in result.__dataclass_fields__
        if isinstance(value := getattr(result, name), (int, float)) and not isinstance(value, bool)
    }
