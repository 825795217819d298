"""How a command ends: its exit code, the summary for machines, and the webhook."""

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from slm.config import Config
from slm.digests import Provenance
from slm.errors import (
    NO_CREDENTIALS,
    InputError,
    KilledError,
    StepError,
    ToldError,
    UnreachableError,
    VerdictError,
    as_user_error,
)
from slm.evaluation import measure
from slm.exporters import process, worker
from slm.proof import prove
from slm.records import LoggedModel, RegisteredVersion, Registration
from slm.running import summary
from slm.running.summary import Summary, note_step, post
from tests.conftest import composed, ended

VERSION = RegisteredVersion("tiny-chat", "2", "champion")


def failing(error: BaseException) -> Callable[[Config], object]:
    def step(_: Config) -> object:
        raise error

    return step


def registering(_: Config) -> None:
    registration = Registration("models:/tiny-chat@champion", "passed", [VERSION], True)
    note_step("register", registration, 1.5, "never made", "run-1")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StepError("it cannot"), 1),
        (InputError("no such folder"), 2),
        (VerdictError("perplexity_ratio is 9"), 3),
        (ToldError("register failed: perplexity_ratio is 9", 3), 3),
        (UnreachableError("the model hub cannot be reached"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (PermissionError("/sys/nowhere"), 4),
        (MemoryError("std::bad_alloc"), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4),
        (KilledError("the exporter"), 4),
        (MlflowException(f"{NO_CREDENTIALS} with MLflow tracking URI 'databricks'"), 2),
        (MlflowException("API request to http://host failed"), 4),
        (MlflowException("no such run", RESOURCE_DOES_NOT_EXIST), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_of_the_users_has_an_exit_code(error: BaseException, code: int) -> None:
    known = as_user_error(error)
    assert known is not None and known.exit_code == code


def test_a_worker_that_is_killed_is_infrastructure_and_names_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    model = LoggedModel("models:/m-1", "n", "m", "chat", "0" * 64, Provenance({}))
    config, scratch = composed(), str(tmp_path / "scratch")
    asked = measure.request_of(measure.Inputs([], model, None, [], [], ""), config.evaluate)
    export = worker.Request("", str(tmp_path), scratch, config.target, [], "", 0)
    for work in (
        lambda: process.run_worker(export),
        lambda: measure.run_worker(model, asked, tmp_path),
        lambda: prove([model.uri], python=str(python)),
    ):
        with pytest.raises(KilledError, match="lack of memory"):
            work()


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (ZeroDivisionError("nobody expected it"), 1, "failed"),
        (VerdictError("perplexity_ratio is 9"), 3, "failed"),
        (KeyboardInterrupt("interrupted"), 130, "interrupted"),
    ],
)
def test_a_command_that_fails_exits_so_and_leaves_a_summary(
    error: BaseException, code: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "summary.json"
    assert ended(failing(error), monkeypatch, f"summary={file}") == code
    found = json.loads(file.read_text())
    assert (found["exit_code"], found["status"]) == (code, status)
    assert str(error) in found["error"] and found["model"] == "smollm2-135m-instruct"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=phi-9", "summary={}"],
        ["--overrides", '["model=phi-9", "summary={}"]'],
        ["--model", "phi-9", "--json", "{}"],
        ["--model=phi-9", "--json={}"],
        ["--overrides", "[evaluate=smoke]", "--json", "{}"],
        ["--overrides", '["evaluate=smoke", 1]', "--json", "{}"],
        ["--colour", "red", "--overrides", "model.name=a summary='{}'"],
    ],
)
def test_what_cannot_be_composed_is_bad_input_and_in_the_summary(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    file.write_text("of an earlier run")
    assert ended(registering, monkeypatch, *(a.format(file) for a in arguments)) == 2
    assert json.loads(file.read_text())["exit_code"] == 2


def test_a_summary_that_can_be_no_file_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(registering, monkeypatch, f"summary={tmp_path}") == 2
    assert f"summary={tmp_path} cannot be written" in capsys.readouterr().err


def test_what_is_of_no_configured_model_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    assert ended(registering, monkeypatch, f"summary={file}", name="score") == 0
    assert json.loads(file.read_text())["model"] == ""


def test_a_summary_is_json_whatever_is_hidden_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", 'a "quoted\\secret"')
    error = 'at "https://h/x?sig=abc": "Authorization: Bearer abc", a "quoted\\secret"'
    shown = 'at "https://h/x?sig=***": "Authorization: ***", ***'
    assert json.loads(Summary("main", error=error).json())["error"] == shown


def test_a_step_that_is_none_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(registering, monkeypatch, "force=fetch,exports") == 2


@pytest.mark.parametrize(
    "given",
    [["force=fetch,evaluate"], ["--force=fetch,evaluate"], ["--overrides", "force=fetch,evaluate"]],
)
def test_steps_to_force_are_listed_with_commas(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []
    assert ended(lambda config: found.append(config.force), monkeypatch, *given) == 0
    assert found == [["fetch", "evaluate"]]


def test_the_summary_says_what_was_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(registering, monkeypatch, "--summary", str(tmp_path / "summary.json")) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["status"], found["verdict"], found["schema"]) == ("done", "passed", 1)
    assert found["registered"] == [{"name": "tiny-chat", "version": "2", "alias": "champion"}]
    assert found["steps"]["register"]["duration_s"] == 1.5


def test_nothing_changed_is_said_only_of_what_reused_everything() -> None:
    told = Summary("main")
    assert told.status == "done"
    told.steps = {"fetch": summary.Done("/a", 1.0, True, "", "1")}
    assert told.status == "unchanged"
    told.steps["export_onnx"] = summary.Done("/b", 1.0, False, "never made", "2")
    assert told.status == "done"


class Receiver(HTTPServer):
    """A webhook: keeps what is posted, and answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.status = 200

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(json.loads(body))
        self.send_response(self.server.status)
        self.end_headers()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("slack", ["no", "by host", "by format"])
def test_the_webhook_gets_the_summary_in_the_form_that_it_reads(
    slack: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slack == "by host":
        monkeypatch.setattr(summary, "SLACK", receiver.host)
    told = Summary("main", exit_code=3, error="too far off", model="tiny", target="cpu")
    form = "slack" if slack == "by format" else ""
    post(told, f"http://{receiver.host}/services/T0/secret", form)
    [body] = receiver.bodies
    if slack == "no":
        assert body["exit_code"] == 3 and body["entry_point"] == "main"
    else:
        assert body == {"text": "main of tiny for cpu: failed (exit code 3); too far off"}


@pytest.mark.parametrize("wrong", ["refuses", "down", "no URL", "no host"])
def test_a_webhook_that_fails_is_a_warning_without_its_secret(
    wrong: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.status = 500
    urls = {
        "refuses": f"http://user:secret@{receiver.host}/secret",
        "down": "http://127.0.0.1:9/secret",
        "no URL": "secret",
        "no host": "http:///sec ret/secret",
    }
    said: list[str] = []
    monkeypatch.setattr(summary.log, "warning", lambda text, *args: said.append(text % args))
    post(Summary("main"), urls[wrong], "")
    assert len(said) == 1 and "the webhook at" in said[0] and "secret" not in said[0]


def test_a_form_that_the_webhook_does_not_have_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    monkeypatch.setenv(summary.FORMAT, "teams")
    assert ended(registering, monkeypatch, f"summary={file}") == 2
    assert "it must be json or slack, or not set" in json.loads(file.read_text())["error"]


def test_a_command_posts_once_whatever_it_starts(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of main inherit its environment."""
    found: list[bool] = []

    def step(_: Config) -> None:
        found.append(summary.WEBHOOK in os.environ)

    monkeypatch.setenv(summary.WEBHOOK, f"http://{receiver.host}/secret")
    assert ended(step, monkeypatch) == 0
    assert found == [False] and len(receiver.bodies) == 1


def test_who_asks_for_the_configuration_has_run_nothing(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(summary.WEBHOOK, f"http://{receiver.host}/secret")
    assert ended(registering, monkeypatch, "--cfg", "job") == 0
    assert not receiver.bodies
