"""What the tests of register and rollback share: evaluations, what a registry holds, hard kills."""

import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

import steps.register
import steps.registry
from steps.registry import aliases_of
from steps.rollback import rollback
from tests.conftest import MODEL, TARGET, Project, composed, copy_store, tracking

CHAT, PROMPT = f"{MODEL}-{TARGET}-chat", f"{MODEL}-{TARGET}-prompt"
CHECKPOINT = f"{MODEL}-transformers"
KILLED = 9
WRITES = ("create_", "set_", "delete_", "update_")


def register(project: Project, evaluation: dict[str, Any]) -> steps.register.Registration:
    with tracking(project):
        return steps.register.register(evaluation, composed().register, os.urandom(8).hex())


def seen(evaluation: dict[str, Any], champion: str, **metrics: float) -> dict[str, Any]:
    """An evaluation that saw a champion as good as itself but for `metrics`, factors."""
    own = evaluation["candidate_metrics"]
    theirs = {name: value * metrics.get(name, 1) for name, value in own.items()}
    return evaluation | {"champion": f"models:/{CHAT}/{champion}", "champion_metrics": theirs}


def aliases(project: Project, name: str = CHAT) -> dict[str, str]:
    return aliases_of(project.client, name)


def state(project: Project) -> dict[str, Any]:
    """Everything that a registry says: aliases, tags, versions, and the logged models' links."""
    client = project.client
    versions = client.search_model_versions()
    models = client.search_logged_models(["1"])
    return {
        "models": {m.name: (m.aliases, m.tags) for m in client.search_registered_models()},
        "versions": {(v.name, v.version): (v.tags, v.description, v.source) for v in versions},
        "links": {m.model_id: m.tags.get("mlflow.modelVersions") for m in models},
    }


def killed_before_each_write(
    base: Project, work: Callable[[Project], object], folder: Path
) -> list[dict[str, Any]]:
    """Kill `work` before its first write to a copy of `base`, then run it; before its second, …

    Returns the states that the second runs end with; the last one was never killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry_state"])
    states: list[dict[str, Any]] = []
    exit_code = KILLED
    while exit_code == KILLED:
        project = Project(folder / str(len(states)), base.made)
        copy_store(base.folder / "mlflow.db", project.folder)
        for write in (len(states) + 1, 0):
            process = context.Process(target=run_until, args=(write, work, project))
            process.start()
            process.join()
            if write:
                exit_code = process.exitcode
                if exit_code != KILLED:
                    break
        assert process.exitcode == 0
        states.append(state(project))
    return states


def run_until(write: int, work: Callable[[Project], object], project: Project) -> None:
    """Run `work`, and end the process without ceremony before that write of its main thread."""
    import threading

    steps.registry.LEASE_S = 0.3
    # The proof writes nothing. It is run for good on the same models by the fixture `generations`.
    steps.register.subprocess.run = lambda command, **_: subprocess.CompletedProcess(command, 0)
    count = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if threading.current_thread() is threading.main_thread():
                count += 1
                if count == write:
                    os._exit(KILLED)
            return method(*arguments, **named)

        return call

    for name in dir(MlflowClient):
        if name.startswith(WRITES):
            setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
    mlflow.set_tracking_uri(project.tracking_uri)
    work(project)


def go_back(project: Project, *names: str) -> None:
    with tracking(project):
        rollback(list(names or (CHAT, PROMPT)), "slow", os.urandom(8).hex())
