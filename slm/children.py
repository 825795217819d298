"""Runs entry points of MLproject as child runs of this command's run, or reuses their outcomes."""

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.exceptions import ExecutionException

from slm.config import Config
from slm.config.common import ROOT
from slm.errors import InfrastructureError, StepError, ToldError, UserError, is_away
from slm.planning import require_room
from slm.records import from_json
from slm.running.chain import Link, given_overrides, is_of_target, kept, of_target, pipeline
from slm.running.killed import was_killed
from slm.running.run import Ask
from slm.running.summary import note_step
from slm.running.work import RESULT, NotKept, work_folder

log = logging.getLogger("slm.children")


@dataclass(frozen=True)
class Child:
    """A step that ran as a child run: its outcome, how long it took, and whether it was reused."""

    outcome: Any
    duration_s: float
    reused: bool


class Chain:
    """Runs entry points of MLproject one after the other, each as a child run."""

    def __init__(self, config: Config, model: str, target: str, overrides: list[str]) -> None:
        self.config, self.target = config, target
        self.overrides, self.links = overrides, pipeline(config)
        self.parameters = {"model": model, "target": target, "overrides": json.dumps(overrides)}
        self.children: dict[str, Child] = {}
        self.has_room = False

    @property
    def outcomes(self) -> dict[str, Any]:
        return {step: child.outcome for step, child in self.children.items()}

    @property
    def nothing_changed(self) -> bool:
        return all(child.reused for child in self.children.values())

    def run(self, link: Link) -> None:
        """Run a step, or reuse its outcome; ToldError with the step's own error if it fails.

        InfrastructureError if it was killed, StepError if it fails without a word otherwise. The
        first step that has to run first asks for the disk and memory of all that are to come.
        """
        log.info("step %d of %d: %s", len(self.children) + 1, len(self.links), link.name)
        start = time.monotonic()
        inputs = link.inputs(self.outcomes)
        try:
            own = of_target(self.config, link.target)
            result = kept(link.step, own, inputs, Ask.reuse)
        except (NotKept, UserError):
            if not self.has_room:
                require_room(self.config, self.outcomes)
                self.has_room = True
            self.children[link.name] = self.child(link, inputs)
        else:
            log.info("%s is reused: %s", link.name, result.uri)
            self.children[link.name] = Child(result, time.monotonic() - start, reused=True)

    def child(self, link: Link, inputs: dict[str, Any]) -> Child:
        """Run a step in a process of its own, and read what it left in its MLflow run."""
        told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in inputs.items()}
        own = {}
        if link.target:
            overrides = [o for o in self.overrides if not is_of_target(o)]
            own = {"target": link.target, "overrides": json.dumps(overrides)}
        run = mlflow.get_run(self.started(link.step, {**self.parameters, **own, **told}))
        record = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/{RESULT}")["outcome"]
        result = from_json(link.outcome, record)
        seconds, why = run.data.metrics["duration_s"], run.data.tags.get("why", "")
        note_step(link.name, result, seconds, why, run.info.run_id)
        return Child(result, seconds, reused=not why)

    def started(self, step: str, parameters: dict[str, str]) -> str:
        """Run an entry point to its end; once more if the tracking server went away under it."""
        try:
            return self.start(step, parameters)
        except StepError as error:
            if not is_away(str(error)):
                raise
            log.info("%s runs again: the tracking server went away", step)
            return self.start(step, parameters)

    def start(self, step: str, parameters: dict[str, str]) -> str:
        """Run an entry point to its end; return the id of its run."""
        parent = mlflow.active_run()
        assert parent is not None
        try:
            with tempfile.TemporaryDirectory() as scratch:  # MLflow makes a folder, and leaves it
                return mlflow.run(
                    str(ROOT),
                    entry_point=step,
                    parameters=parameters,
                    experiment_id=parent.info.experiment_id,
                    run_name=step,
                    env_manager="local",
                    storage_dir=scratch,
                ).run_id
        except ExecutionException as error:
            children = mlflow.MlflowClient().search_runs(
                [parent.info.experiment_id],
                filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            tags = children[0].data.tags if children else {}
            if reason := tags.get("error"):
                code = int(tags.get("exit_code", StepError.exit_code))
                raise ToldError(f"{step} failed: {reason}", code) from error
            if children and was_killed(children[0], work_folder(self.config.paths.work)):
                raise InfrastructureError(
                    f"{step} ended without a word: it was killed, most likely for lack of memory "
                    "(`-e plan` says what it takes), or its tracking server went away. Run it "
                    "again."
                ) from error
            raise StepError(f"{step} failed: {error}") from error


def overrides_for_children() -> list[str]:
    """The overrides of this command, without model and target, which children get by name.

    As they were given: `${oc.env:SOURCE}` is looked up by each child, and stands so in its
    parameters. Children are not told of what is this command's own affair: it writes the summary,
    it chooses, and it asked for disk and memory.
    """
    theirs = given_overrides(
        "model", "target", "summary", "ladder", "budget", "objective", "preflight"
    )
    return [*theirs, "preflight=off"]
