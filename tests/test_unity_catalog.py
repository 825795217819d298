"""Unity Catalog as registry: Databricks' and MLflow's clients against the stand-in's limits."""

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

import steps.register
from slm.errors import InputError, StepError
from slm.evaluation.summary import next_lines
from slm.records import Evaluation, Registration
from slm.registry.kinds import require_registry
from slm.registry.names import LOGGED_MODEL, aliases_of
from slm.registry.turns import turn
from steps.rollback import Request, rollback
from tests.conftest import MODEL, TARGET, composed
from tests.databricks import Workspace
from tests.registry_state import STORES
from tests.tiny_models import evaluated

pytestmark = pytest.mark.xdist_group("databricks")


@pytest.fixture
def catalog(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A schema of its own in the workspace's Unity Catalog; tracking is the workspace's too."""
    for name, value in workspace.environment.items():
        monkeypatch.setenv(name, value)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("databricks")
    mlflow.set_registry_uri("databricks-uc")
    mlflow.set_experiment("/Shared/tests")
    yield f"Main.{tmp_path.name}"
    workspace.denied.clear()
    workspace.catalog.files_api = True
    mlflow.set_registry_uri("")
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def logged() -> dict[str, Evaluation]:
    """The generations that were logged to the workspace's tracking, by name."""
    return {}


@pytest.fixture
def first(catalog: str, logged: dict[str, Evaluation]) -> Evaluation:
    """A first generation, without a champion to stand against."""
    if not logged:
        logged["first"] = evaluated("first")
    return logged["first"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking store apart from the workspace."""
    return f"sqlite:///{tmp_path_factory.mktemp('apart') / 'mlflow.db'}"


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)


def register(evaluation: Evaluation, catalog: str) -> Registration:
    settings = composed(f"register.catalog={catalog}").register
    return steps.register.register(evaluation, settings, os.urandom(8).hex())


def names(catalog: str) -> list[str]:
    parts = f"{MODEL}-{TARGET}-chat", f"{MODEL}-{TARGET}-prompt", f"{MODEL}-transformers"
    return [f"{catalog}.{part}".lower() for part in parts]


def test_a_model_is_registered_proven_promoted_and_rolled_back(
    catalog: str, first: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()
    chat, prompt, checkpoint = names(catalog)
    registration = register(first, catalog)
    assert registration.uri == f"models:/{chat}@champion"
    version = client.get_model_version(chat, "1")
    assert version.tags["answered"] and version.tags["succeeds"] == "none"
    assert set(json.loads(version.tags["metrics"])) < set(first.candidate_metrics)

    assert register(first, catalog) == registration
    assert len(client.search_model_versions(f"name = '{checkpoint}'")) == 1

    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
    champion = {"champion": f"models:/{chat}/1", "champion_metrics": first.candidate_metrics}
    assert register(evaluated("second", **champion), catalog).promoted
    assert aliases_of(client, chat) == aliases_of(client, prompt)
    assert aliases_of(client, chat) == {"champion": "2", "previous": "1"}
    assert aliases_of(client, checkpoint) == {"champion": "1"}

    with pytest.raises(InputError, match="reason is .* characters too long for a tag"):
        rollback([chat, prompt], Request("slow" * 300), "r")
    assert aliases_of(client, chat)["champion"] == "2"
    rollback([chat, prompt], Request("slow"), "r")
    assert aliases_of(client, chat) == aliases_of(client, prompt) == {"champion": "1"}


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_registry_apart_from_the_tracking_store_gets_one_version_and_a_copy_of_the_files(
    catalog: str, apart: str, unproven: None, tmp_path: Path, as_uri: bool
) -> None:
    mlflow.set_tracking_uri(apart)
    place = (tmp_path / "mlruns").as_uri() if as_uri else str(tmp_path / "mlruns")
    mlflow.create_experiment(place, artifact_location=place)
    mlflow.set_experiment(place)
    evaluation = evaluated("first")
    before = contents(tmp_path / "mlruns")
    [chat, *_] = names(catalog)
    assert register(evaluation, catalog) == register(evaluation, catalog)
    assert contents(tmp_path / "mlruns") == before
    [version] = MlflowClient().search_model_versions(f"name = '{chat}'")
    tags = MlflowClient().get_model_version(chat, version.version).tags
    assert f"models:/{tags[LOGGED_MODEL]}" == evaluation.candidates[0]
    linked = mlflow.get_logged_model(tags[LOGGED_MODEL]).tags["mlflow.modelVersions"]
    assert json.loads(linked) == [{"name": chat, "version": "1"}]


@pytest.mark.parametrize(
    ("denied", "words"),
    [
        (("POST", "registered-models/create"), "you may not create .*CREATE MODEL"),
        (("DELETE", "registered-models/alias"), "you may not delete aliases of .* own it"),
        (("DELETE", "registered-models/delete-tag"), "you may not write tags of .* own it"),
    ],
)
def test_a_missing_right_is_named_before_the_first_write(
    workspace: Workspace,
    catalog: str,
    first: Evaluation,
    unproven: None,
    denied: tuple[str, str],
    words: str,
) -> None:
    if denied[1] != "registered-models/create":
        for name in names(catalog):
            MlflowClient().create_registered_model(name)
    before = state(workspace)
    workspace.denied.add(denied)
    with pytest.raises(StepError, match=f"{words}.*the right to"):
        register(first, catalog)
    assert state(workspace) == before


def test_models_that_exist_are_registered_without_the_right_to_create_any(
    workspace: Workspace, catalog: str, first: Evaluation, unproven: None
) -> None:
    for name in names(catalog):
        MlflowClient().create_registered_model(name)
    workspace.denied.add(("POST", "registered-models/create"))
    assert register(first, catalog).promoted


def test_a_missing_client_of_the_clouds_storage_is_one_line_that_names_the_package(
    workspace: Workspace,
    catalog: str,
    first: Evaluation,
    unproven: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace.catalog.files_api = False
    with monkeypatch.context() as patched:
        for name in [name for name in sys.modules if name.split(".")[0] == "boto3"]:
            patched.delitem(sys.modules, name)
        patched.setitem(sys.modules, "boto3", None)  # as if it were not installed
        with pytest.raises(StepError, match=r"boto3.* Install 'mlflow\[databricks\]=="):
            register(first, catalog)
    workspace.catalog.files_api = True
    assert register(first, catalog).versions[0].version == "2"  # 1 stays pending


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("uc:http://127.0.0.1:8080", "open-source Unity Catalog, where MLflow has no aliases"),
        ("databricks", "the workspace's registry, where MLflow has no aliases"),
        ("databricks://profile", "the workspace's registry"),
        ("databricks-uc", "register.catalog is not set. Set register.catalog=<catalog>.<schema>"),
    ],
)
def test_a_registry_that_cannot_have_a_champion_is_refused(
    monkeypatch: pytest.MonkeyPatch, uri: str, words: str
) -> None:
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: uri)
    with pytest.raises(InputError, match=words):
        require_registry(composed().register)


def test_one_looks_at_the_workspaces_own_page(workspace: Workspace, catalog: str) -> None:
    lines = next_lines("", "", f"models:/{catalog}.chat@champion")
    assert lines["Look"] == f"{workspace.address}/ml/experiments"


def test_processes_take_turns(workspace: Workspace, catalog: str, tmp_path: Path) -> None:
    chat, prompt, checkpoint = names(catalog)
    for name in (chat, prompt, checkpoint):
        MlflowClient().create_registered_model(name)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry_state", *STORES])
    processes = [
        context.Process(target=take_turns, args=(workspace.environment, pair, tmp_path))
        for pair in ([chat, checkpoint], [prompt, checkpoint])
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert not MlflowClient().get_registered_model(checkpoint).tags


def take_turns(environment: dict[str, str], models: list[str], folder: Path) -> None:
    os.environ.update(environment)
    mlflow.set_registry_uri("databricks-uc")
    for _ in range(3):
        with turn(MlflowClient(), models, os.urandom(8).hex()):
            (folder / "held").touch(exist_ok=False)
            (folder / "held").unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(workspace: Workspace) -> list[dict[str, Any]]:
    """What the catalog holds."""
    store = workspace.catalog.store
    models = store.search_registered_models(max_results=1000)
    return [
        *(dict(store.get_registered_model(model.name)) for model in models),
        *(dict(version) for version in store.search_model_versions(max_results=1000)),
    ]
