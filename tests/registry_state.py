"""What the tests of register and rollback share: evaluations, what a registry holds, kills."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import steps.register
from slm.config.common import ROOT
from slm.records import Evaluation, Registration
from slm.registry.names import aliases_of
from slm.running.work import enum_value
from steps.rollback import Request, rollback
from tests.conftest import MODEL, TARGET, Generations, Project, composed, copy_store, tracking

CHAT, PROMPT = f"{MODEL}-{TARGET}-chat", f"{MODEL}-{TARGET}-prompt"
CHECKPOINT = f"{MODEL}-transformers"
STORES = [f"mlflow.store.{store}.sqlalchemy_store" for store in ("tracking", "model_registry")]
WRITES = ("create_", "set_", "delete_", "update_")


def register(project: Project, evaluation: Evaluation, *overrides: str) -> Registration:
    settings = composed(*overrides).register
    with tracking(project):
        return steps.register.register(evaluation, settings, os.urandom(8).hex())


def start_register(
    project: Project, evaluation: Evaluation, **environment: str
) -> subprocess.Popen[str]:
    """`register` as a process of its own, given what evaluate leaves."""
    file = project.folder / f"{evaluation.candidates[0][-8:]}.json"
    file.write_text(json.dumps({"outcome": evaluation.json()}, default=enum_value))
    command = [sys.executable, "-m", "steps.register", f"source={file}"]
    everything = {**project.environment, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=everything, stderr=subprocess.PIPE, text=True)


def seen(evaluation: Evaluation, champion: str, **metrics: float) -> Evaluation:
    """An evaluation that saw a champion as good as itself but for `metrics`, factors."""
    own = evaluation.candidate_metrics
    theirs = {name: value * metrics.get(name, 1) for name, value in own.items()}
    return replace(evaluation, champion=f"models:/{CHAT}/{champion}", champion_metrics=theirs)


def aliases(project: Project, name: str = CHAT) -> dict[str, str]:
    return aliases_of(project.client, name)


def state(project: Project) -> dict[str, Any]:
    """Everything that a registry says: aliases, tags, versions, and the logged models' links."""
    client = project.client
    versions = client.search_model_versions()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    models = client.search_logged_models(experiments)
    return {
        "models": {m.name: (m.aliases, m.tags) for m in client.search_registered_models()},
        "versions": {(v.name, v.version): (v.tags, v.description, v.source) for v in versions},
        "links": {m.model_id: m.tags.get("mlflow.modelVersions") for m in models},
    }


def after_kills(
    base: Generations, work: Callable[[Generations], object], folder: Path
) -> list[dict[str, Any]]:
    """The states that `work` ends with where an earlier run was killed before its n-th write.

    Every other write, or each of them with `make test-kills`. What a kill leaves is a copy of the
    store from before that write: each write is a transaction. The last state is that of a run that
    was not killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry_state", *STORES])
    # The server of forks has the environment of the test that first asked for one.
    with ProcessPoolExecutor(2, context, forget_registry) as pool:
        project = Generations(folder / "undisturbed", base.evaluations)
        copy_store(base.folder / "mlflow.db", project.folder)
        left = pool.submit(run_and_copy, work, project, folder).result()
        left = left[:: 1 if "SLM_KILLS" in os.environ else 2]
        return [*pool.map(run_again, [work] * len(left), left), state(project)]


def forget_registry() -> None:
    os.environ.pop("MLFLOW_REGISTRY_URI", None)


def run_and_copy(
    work: Callable[[Generations], object], project: Generations, folder: Path
) -> list[Generations]:
    """Run `work`; copy the store before each write of its thread, which is not the heartbeat's."""
    left: list[Generations] = []

    def copied(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                left.append(Generations(folder / str(len(left)), project.evaluations))
                copy_store(project.folder / "mlflow.db", left[-1].folder)
            return method(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(MlflowClient):
            if name.startswith(WRITES):
                patch.setattr(MlflowClient, name, copied(getattr(MlflowClient, name)))
        run(work, project)
    return left


def run_again(work: Callable[[Generations], object], left: Generations) -> dict[str, Any]:
    """Run `work` on what a kill left, in this process's one store: to open one takes a second."""
    project = Generations(left.folder.parent / f"process-{os.getpid()}", left.evaluations)
    copy_store(left.folder / "mlflow.db", project.folder)
    return run(work, project)


def run(work: Callable[[Generations], object], project: Generations) -> dict[str, Any]:
    """Run `work` where the dead are known as such in no time, and return the state it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slm.registry.turns.LEASE_S", 0.3)
        # The proof writes nothing; `generations` ran it on the same models.
        patch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
        work(project)
    return state(project)


def go_back(project: Project, *names: str) -> None:
    with tracking(project):
        rollback(list(names or (CHAT, PROMPT)), Request("slow"), os.urandom(8).hex())
