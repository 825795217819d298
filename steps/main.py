"""Run every step in turn, from a model's source to registered versions.

mlflow run . --env-manager local
python -m steps.main model=phi-3-mini-4k-instruct target=cuda-int4-rtn-block-32
"""

import json
import logging
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
from hydra.core.hydra_config import HydraConfig
from mlflow.exceptions import ExecutionException
from mlflow.utils.databricks_utils import get_databricks_host_creds
from omegaconf import OmegaConf

from slm.config import ROOT, Config
from slm.errors import InfrastructureError, StepError, ToldError, UserError, is_away
from slm.evaluation.summary import show
from slm.records import from_json
from slm.redaction import redacted
from slm.registry.kinds import require_registry
from slm.running.chain import Link, is_of_target, kept, of_first_target, of_target, pipeline
from slm.running.command import entry_point
from slm.running.killed import was_killed
from slm.running.run import Ask
from slm.running.summary import note_step
from slm.running.tracking import mlflow_run, store_variables
from slm.running.work import RESULT, NotKept, enum_value, work_folder
from slm.seal import require_key_to_sign

log = logging.getLogger("slm.main")


@dataclass(frozen=True)
class Child:
    """A step that ran as a child run: its outcome, how long it took, and whether it was reused."""

    outcome: Any
    duration_s: float
    reused: bool


class Chain:
    """Runs entry points of MLproject one after the other, each as a child run."""

    def __init__(self, config: Config, model: str, target: str, overrides: list[str]) -> None:
        self.config, self.overrides, self.links = config, overrides, pipeline(config)
        self.parameters = {"model": model, "target": target, "overrides": json.dumps(overrides)}
        self.children: dict[str, Child] = {}

    @property
    def nothing_changed(self) -> bool:
        return all(child.reused for child in self.children.values())

    def run(self, link: Link) -> None:
        """Run a step, or reuse its outcome; ToldError with the step's own error if it fails.

        InfrastructureError if it was killed, StepError if it fails without a word otherwise.
        """
        log.info("main: step %d of %d: %s", len(self.children) + 1, len(self.links), link.name)
        start = time.monotonic()
        inputs = link.inputs({name: child.outcome for name, child in self.children.items()})
        try:
            own = of_target(self.config, link.target)
            result = kept(link.step, own, inputs, Ask.reuse)
        except (NotKept, UserError):
            self.children[link.name] = self.child(link, inputs)
        else:
            log.info("main: %s is reused: %s", link.name, result.uri)
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
            log.info("main: %s runs again: the tracking server went away", step)
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
    parameters. Children are not told of the summary: this command writes it.
    """
    hydra = HydraConfig.get()
    search_path = [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    own_conf = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    search_path += [f"hydra.searchpath=[file://{path}]" for path in own_conf]
    not_theirs = ("model=", "target=", "summary=")
    given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    own = [o for o in given if not o.startswith(not_theirs)]
    return [*search_path, *own]


def next_lines(work: str, report: str, registered: str) -> dict[str, str]:
    """Where things lie, and what to do next: commands that work in any terminal and folder."""
    stores = store_variables()
    tracking, registry = (shlex.quote(redacted(uri)) for uri in stores.values())
    scripts = Path(sys.executable).parent
    mlflow_command = shlex.quote(str(scripts / "mlflow"))
    look = f"{mlflow_command} ui --backend-store-uri {tracking}"
    serve = f"{mlflow_command} models serve -m {registered} --env-manager local -p 5001"
    if registry != tracking:
        look += f" --registry-store-uri {registry}"
        serve = f"MLFLOW_REGISTRY_URI={registry} {serve}"
    # The scoring server starts uvicorn by name.
    serve = f"PATH={shlex.quote(str(scripts))}:$PATH MLFLOW_TRACKING_URI={tracking} {serve}"
    if any(uri.startswith("file:") for uri in stores.values()):  # MLflow 3.17 wants to be told so
        look, serve = (f"MLFLOW_ALLOW_FILE_STORE=true {line}" for line in (look, serve))
    if tracking.startswith("http"):
        look = tracking
    elif tracking.startswith("databricks"):
        look = f"{get_databricks_host_creds(tracking).host}/ml/experiments"
    return {
        "Work": str(work_folder(work)),
        "Report": report,
        "Look": look,
        "Serve": serve,
    }


def main(config: Config) -> None:
    require_registry(config.register)
    require_key_to_sign(config.signing)
    choices, asked = HydraConfig.get().runtime.choices, config
    config = of_first_target(config)
    target = choices["target"] if config is asked else config.target.name
    chain = Chain(config, choices["model"], target, overrides_for_children())
    with mlflow_run("main", work_folder(config.paths.work)):
        mlflow.log_params({"model.name": config.model.name, "target.name": config.target_name})
        for link in chain.links:
            chain.run(link)
        evaluation, registration = (
            chain.children[step].outcome for step in ("evaluate", "register")
        )
        mlflow.set_tags({"verdict": evaluation.verdict, "registered": registration.uri})
        mlflow.log_metrics(
            {f"{step}.duration_s": child.duration_s for step, child in chain.children.items()}
        )
        mlflow.log_metrics(evaluation.candidate_metrics)
        mlflow.log_text(summary_of(chain), "result.json")
    rows = [
        [step, f"{child.duration_s:.1f}", ("reused " if child.reused else "") + child.outcome.uri]
        for step, child in chain.children.items()
    ]
    lines = next_lines(config.paths.work, evaluation.report, registration.uri)
    if chain.nothing_changed:
        lines = {"Nothing changed": "every outcome was reused, and no version made", **lines}
    show(rows, evaluation, registration, lines)


def summary_of(chain: Chain) -> str:
    """The outcomes of all steps, as JSON."""
    outcomes: dict[str, dict[str, Any]] = {
        step: {
            **asdict(child.outcome),
            "duration_s": child.duration_s,
            "reused": child.reused,
        }
        for step, child in chain.children.items()
    }
    return json.dumps(outcomes, indent=2, default=enum_value)


if __name__ == "__main__":
    entry_point(main)
