"""A tracking server with MLflow's basic authentication, a user of few rights, and lost replies."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.server import get_app_client

import steps.register
from slm.errors import StepError
from slm.running.tracking import downloads, local_path
from tests.conftest import TARGET, Project, composed
from tests.registry_state import CHAT, CHECKPOINT, PROMPT, state
from tests.servers import Lossy, Server
from tests.tiny_models import evaluated, log_tiny

ADMIN, USER = ("admin", "of-these-tests-1"), ("user", "of-these-tests-2")
SETTINGS = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/users.db
admin_username = {admin[0]}
admin_password = {admin[1]}
auth_cache_ttl_seconds = 600
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp_path = tmp_path_factory.mktemp("server")
    settings = tmp_path / "auth.ini"
    settings.write_text(SETTINGS.format(folder=tmp_path, admin=ADMIN))
    options = ["--app-name", "basic-auth", "--artifacts-destination", str(tmp_path / "artifacts")]
    server = Server(
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        tmp_path,
        *options,
        MLFLOW_AUTH_CONFIG_PATH=str(settings),
        MLFLOW_FLASK_SERVER_SECRET_KEY="of these tests",
    )
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(server.address)
    yield server
    mlflow.set_tracking_uri(before)
    server.kill()


def test_who_may_edit_and_not_delete_is_told_so_and_chat_and_prompt_stay_together(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
    act_as(monkeypatch, *ADMIN)
    rights = get_app_client("basic-auth", tracking_uri=server.address)
    rights.create_user(*USER)
    experiment = mlflow.set_experiment("tests").experiment_id
    rights.grant_user_permission(USER[0], "experiment", experiment, "EDIT")
    settings = composed().register
    first = evaluated("first")
    assert steps.register.register(first, settings, "first").promoted
    for name in (CHAT, PROMPT, CHECKPOINT):
        rights.grant_user_permission(USER[0], "registered_model", name, "EDIT")
    champion = {"champion": f"models:/{CHAT}/1", "champion_metrics": first.candidate_metrics}

    act_as(monkeypatch, *USER)
    second = evaluated("second", **champion)
    before = state(Project(server.folder))
    words = f"you may not delete aliases of {CHAT}; nothing was changed. Ask for .* MANAGE on it"
    with pytest.raises(StepError, match=words):
        steps.register.register(second, settings, "second")
    assert state(Project(server.folder)) == before


def test_a_version_is_made_once_though_the_registrys_reply_is_lost(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
    act_as(monkeypatch, *ADMIN)
    mlflow.set_experiment("tests")
    with Lossy(server, "model-versions/create", losses=2) as lossy:
        mlflow.set_tracking_uri(lossy.address)
        registration = steps.register.register(evaluated("lost"), composed().register, "lost")
        mlflow.set_tracking_uri(server.address)
        lossy.shutdown()
    assert lossy.losses == 0
    for made in registration.versions:
        content = mlflow.MlflowClient().get_model_version(made.name, made.version).tags["content"]
        found = mlflow.search_model_versions(filter_string=f"name = '{made.name}'")
        assert [str(v.version) for v in found if v.tags["content"] == content] == [made.version]


def test_what_is_downloaded_goes_with_the_process(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    act_as(monkeypatch, *ADMIN)
    mlflow.set_experiment("tests")
    uri, own = log_tiny("downloaded", "chat", TARGET).uri, tmp_path / "own"
    own.mkdir()
    assert local_path(uri, "model_uri", "register", own).is_relative_to(own)
    folder = local_path(uri, "model_uri", "register")
    assert (folder / "MLmodel").is_file() and folder.is_relative_to(downloads().name)
    downloads().cleanup()
    downloads.cache_clear()
    assert not list(tmp_path.glob("*/MLmodel")) and not folder.exists()


def act_as(monkeypatch: pytest.MonkeyPatch, name: str, password: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
